"""Chapter 7 - The VQ-GAN: image <-> tokens (section 3.1; Esser et al., CVPR 2021).

The encoder maps an image to a grid of vectors, one vector for each patch. The quantiser replaces each vector by the
nearest vector of a codebook: the index of that codebook vector is the image token. The decoder maps the codebook
vectors back to pixels. The structure and the module names are those of taming-transformers, so that its published
files load unchanged. Level 0 (`down.0`, `up.0`) is the full resolution.

One option is ours: with `vq_patchwise` the encoder sees one patch at a time. Without it, the vector of a patch depends
on the rest of the image, through 3x3 convolutions and through GroupNorm, which averages over the whole image. Equal
patches can then get different tokens, which wastes a small codebook.

The codebook is trained by moving averages, not by gradients: see Codebook, at the end of the file.

Shapes: B batch, S image side in pixels, N = G*G tokens in raster order, C channels, c = codebook_dim, V codebook
vectors, M features of a batch. Pixels are in [-1, 1]. Read on in vqgan_loss.py.
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.config import Config


def norm(cfg: Config, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(cfg.vq_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on x if the number of channels changes."""

    def __init__(self, cfg: Config, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = norm(cfg, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(cfg, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """x + attention with one head among all positions of the feature map."""

    def __init__(self, cfg: Config, channels: int):
        super().__init__()
        self.norm = norm(cfg, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)      # (B, C, H, W)
        return x + self.proj_out(h)


def downsample(channels: int) -> nn.Sequential:
    """Halves both sides. Pads right and bottom only, as taming-transformers does."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsample(channels: int) -> nn.Sequential:
    """Doubles both sides: nearest neighbour, then a convolution."""
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2.0, mode="nearest"),
                                     conv=nn.Conv2d(channels, channels, 3, padding=1)))


def middle(cfg: Config, channels: int) -> nn.Sequential:
    """Residual block, attention, residual block, at the lowest resolution."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(cfg, channels, channels), attn_1=AttnBlock(cfg, channels),
                                     block_2=ResnetBlock(cfg, channels, channels)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if `vq_attention` lists this side."""

    def __init__(self, cfg: Config, c_in: int, c_out: int, blocks: int, side: int):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(cfg, c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(cfg, c_out) if side in cfg.vq_attention else nn.Identity()
                                  for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return x


class Encoder(nn.Module):
    """Pixels (B, 3, S, S) -> features (B, vq_latent, G, G)."""

    def __init__(self, cfg: Config):
        super().__init__()
        channels = [cfg.vq_channels * m for m in cfg.vq_multipliers]
        self.conv_in = nn.Conv2d(3, cfg.vq_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([cfg.vq_channels, *channels], channels)):
            self.down.append(Level(cfg, c_in, c_out, cfg.vq_res_blocks, cfg.image_size // 2 ** i))
            self.down[i].downsample = downsample(c_out) if i + 1 < len(channels) else nn.Identity()
        self.mid = middle(cfg, channels[-1])
        self.norm_out = norm(cfg, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], cfg.vq_latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level.downsample(level(h))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features (B, vq_latent, G, G) -> pixels (B, 3, S, S)."""

    def __init__(self, cfg: Config):
        super().__init__()
        channels = [cfg.vq_channels * m for m in cfg.vq_multipliers]
        self.conv_in = nn.Conv2d(cfg.vq_latent, channels[-1], 3, padding=1)
        self.mid = middle(cfg, channels[-1])
        self.up = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([*channels[1:], channels[-1]], channels)):  # up.0 runs last
            self.up.append(Level(cfg, c_in, c_out, cfg.vq_res_blocks + 1, cfg.image_size // 2 ** i))
            self.up[i].upsample = upsample(c_out) if i > 0 else nn.Identity()
        self.norm_out = norm(cfg, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level.upsample(level(h))
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    """The codebook, V vectors, and the search for the nearest one."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.embedding = nn.Embedding(cfg.codebook_size, cfg.codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / cfg.codebook_size, 1 / cfg.codebook_size)

    def forward(self, z: Tensor) -> Tensor:
        """Features (B, c, N) -> codes (B, N): argmin over e of |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, without |z|^2."""
        e, z = self.embedding.weight, z.mT.contiguous()                                            # (V, c), (B, N, c)
        return (e.square().sum(1) - 2 * z @ e.t()).argmin(dim=2)


class VQGAN(nn.Module):
    """Image <-> tokens: `encode` and `decode`. `forward` is for training."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quantize = Quantizer(cfg)
        self.quant_conv = nn.Conv2d(cfg.vq_latent, cfg.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.codebook_dim, cfg.vq_latent, 1)
        # PyTorch's default weights have a third of this variance, and training is then several times slower.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), or a rectangle of whole patches -> image tokens (B, N) long in [0, V)."""
        return self.quantize(self.features(pixels))

    def decode(self, image_tokens: Tensor) -> Tensor:
        """Image tokens (B, N) -> pixels (B, 3, S, S); a few may lie outside [-1, 1]."""
        return self.decode_vectors(self.quantize.embedding(image_tokens).mT)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> the vectors before quantisation (B, c, N)."""
        if not self.cfg.vq_patchwise:
            return self.quant_conv(self.encoder(pixels)).flatten(2)
        p = self.cfg.image_size // self.cfg.grid                                                   # the side of a patch
        patches = F.unfold(pixels, p, stride=p).mT.reshape(-1, 3, p, p)                            # (B*N, 3, p, p)
        patches, index = patches.unique(dim=0, return_inverse=True)  # many are equal: encode each once
        z = self.quant_conv(self.encoder(patches))[index]                                          # (B*N, c, 1, 1)
        return z.view(len(pixels), -1, self.cfg.codebook_dim).mT                                   # (B, c, N)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Codebook vectors, or features that are not quantised (B, c, N) -> pixels (B, 3, S, S)."""
        g = math.isqrt(vectors.shape[2])
        return self.decoder(self.post_quant_conv(vectors.unflatten(2, (g, g))))

    def forward(self, pixels: Tensor, quantise: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the reconstruction (B, 3, S, S), the commitment loss, the features (B, c, N) and the codes (B, N).

        The decoder's input is the codebook vectors e. The choice of the nearest vector has no gradient, so the
        straight-through estimator copies the gradient at e to the features z. The commitment loss |z - e|^2 pulls z
        towards e. The codebook gets no gradient: Codebook updates it.

        With quantise=False the model is a plain autoencoder: the decoder's input is z, and the commitment loss is 0.
        """
        z = self.features(pixels)
        codes = self.quantize(z.detach())
        e = self.quantize.embedding(codes).mT.detach()
        if not quantise:
            return self.decode_vectors(z), torch.zeros((), device=z.device), z, codes
        return self.decode_vectors(z + (e - z).detach()), F.mse_loss(z, e), z, codes


class Codebook(nn.Module):
    """Trains the codebook without gradients: each vector is the moving average of the features that choose it.

    The update is that of VQ-VAE (van den Oord et al., NeurIPS 2017, appendix A.1). Two additions keep most of the
    codebook in use: it starts from k-means, and a vector that is no longer chosen moves to a feature with a large
    quantisation error.
    """

    def __init__(self, embedding: nn.Embedding, decay: float):
        super().__init__()
        self.decay = decay
        self.weight = embedding.weight.requires_grad_(False).detach()         # (V, c) the same memory, not a parameter
        self.register_buffer("count", torch.ones_like(self.weight[:, 0]))     # (V,)   features per update, averaged
        self.register_buffer("total", self.weight.clone())                    # (V, c) their sum per update, averaged

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Sets the codebook to the centres of k-means on the features z (M, c). The first centres are those of
        k-means++: each is a feature, drawn with a probability proportional to its squared distance from the nearest
        centre so far."""
        centres = z[torch.randint(len(z), (1,), generator=generator).to(z.device)]                 # (1, c)
        distance = (z - centres).square().sum(1)                                                   # (M,) to the nearest
        for uniform in torch.rand(len(self.weight) - 1, generator=generator, dtype=torch.float64).to(z.device):
            cumulative = distance.double().cumsum(0)                                               # (M,)
            index = torch.searchsorted(cumulative, uniform * cumulative[-1:], right=True).clamp(max=len(z) - 1)
            centres = torch.cat([centres, z[index]])
            distance = torch.minimum(distance, (z - z[index]).square().sum(1))
        self.weight.copy_(centres)
        for _ in range(10):
            count, total = self._sums(z, torch.cdist(z, self.weight).argmin(1))
            self.weight.copy_(torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], self.weight))
        self.count, self.total = torch.ones_like(self.count), self.weight.clone()

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Updates the moving averages with the features z (M, c) of one batch and their codes (M,)."""
        count, total = self._sums(z, codes)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        # A code is dead when, on average, less than one feature in 50 updates chooses it.
        is_dead = self.count < 0.02                                                                # (V,)
        error = (z - self.weight[codes]).square().sum(1)                                           # (M,)
        index = torch.multinomial(error.cpu() + 1e-12, len(is_dead), replacement=True, generator=generator)
        self.count = torch.where(is_dead, 1.0, self.count)
        self.total = torch.where(is_dead[:, None], z[index.to(z.device)], self.total)
        self.weight.copy_(self.total / self.count[:, None])

    def _sums(self, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The number of features that chose each code (V,), and their sums (V, c)."""
        count = torch.bincount(codes, minlength=len(self.weight)).to(z.dtype)
        return count, torch.zeros_like(self.weight).index_add_(0, codes, z)


def codebook_use(codes: Tensor, codebook_size: int) -> tuple[float, float]:
    """The share of the codebook that occurs in codes (any shape), and the perplexity exp(entropy) of the codes."""
    p = torch.bincount(codes.flatten(), minlength=codebook_size).double() / codes.numel()
    return (p > 0).double().mean().item(), torch.exp(-torch.special.xlogy(p, p).sum()).item()
