"""Chapter 6 - The VQ-GAN: image <-> tokens (section 3.1; Esser et al., CVPR 2021).

An encoder turns each patch of an image into a vector, the quantiser replaces the vector by the nearest of a codebook's
and so by a number, the image token; a decoder paints the image back. The structure and every name are those of
taming-transformers, so that its published files load as they are. `down.0` is the full resolution.

One thing is added for small worlds: `vq_patchwise` lets the encoder see one token's patch at a time. An encoder that
looks beyond it (through 3x3 convolutions, and through GroupNorm's whole-image statistics) tells neighbours apart that
look alike, and spends a small codebook on that.

What trains the codebook, its moving averages, lives outside the network, in Codebook at the end.

Shapes: B batch, S image side in pixels, G = sqrt(N) tokens a side, C channels, V codes. Pixels are in [-1, 1].
Read on in vqloss.py.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.config import Config


def norm(cfg: Config, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(cfg.vq_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, cfg: Config, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = norm(cfg, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(cfg, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + one-headed attention among all places of the feature map."""

    def __init__(self, cfg: Config, channels: int):
        super().__init__()
        self.norm = norm(cfg, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)      # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves the sides; pads right and bottom only, as taming-transformers does."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, cfg: Config, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(cfg, channels, channels), AttnBlock(cfg, channels)
        self.block_2 = ResnetBlock(cfg, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def level(cfg: Config, c_in: int, c_out: int, blocks: int, side: int) -> nn.Module:
    """One resolution: residual blocks, each followed by attention if this side has it."""
    module = nn.Module()
    module.block = nn.ModuleList(ResnetBlock(cfg, c_in if i == 0 else c_out, c_out) for i in range(blocks))
    module.attn = nn.ModuleList(AttnBlock(cfg, c_out) for _ in range(blocks if side in cfg.vq_attention else 0))
    return module


def run_level(module: nn.Module, x: Tensor) -> Tensor:
    for i, block in enumerate(module.block):
        x = block(x)
        if len(module.attn):
            x = module.attn[i](x)
    return x


class Encoder(nn.Module):
    """Pixels (B, 3, S, S) -> features (B, vq_latent, G, G)."""

    def __init__(self, cfg: Config):
        super().__init__()
        channels = [cfg.vq_channels * m for m in cfg.vq_multipliers]
        self.conv_in = nn.Conv2d(3, cfg.vq_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, c_out in enumerate(channels):
            c_in = channels[i - 1] if i else cfg.vq_channels
            self.down.append(level(cfg, c_in, c_out, cfg.vq_res_blocks, cfg.image_size // 2 ** i))
            if i + 1 < len(channels):
                self.down[i].downsample = Downsample(c_out)
        self.mid = Middle(cfg, channels[-1])
        self.norm_out = norm(cfg, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], cfg.vq_latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for module in self.down:
            h = run_level(module, h)
            if hasattr(module, "downsample"):
                h = module.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features (B, vq_latent, G, G) -> pixels (B, 3, S, S)."""

    def __init__(self, cfg: Config):
        super().__init__()
        channels = [cfg.vq_channels * m for m in cfg.vq_multipliers]
        self.conv_in = nn.Conv2d(cfg.vq_latent, channels[-1], 3, padding=1)
        self.mid = Middle(cfg, channels[-1])
        self.up = nn.ModuleList()
        for i, c_out in enumerate(channels):  # up.0 is the full resolution, and runs last
            c_in = channels[min(i + 1, len(channels) - 1)]
            self.up.append(level(cfg, c_in, c_out, cfg.vq_res_blocks + 1, cfg.image_size // 2 ** i))
            if i > 0:
                self.up[i].upsample = Upsample(c_out)
        self.norm_out = norm(cfg, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for module in reversed(self.up):
            h = run_level(module, h)
            if hasattr(module, "upsample"):
                h = module.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    """The codebook: V vectors; a feature becomes the number of the nearest one."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.embedding = nn.Embedding(cfg.codebook_size, cfg.codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / cfg.codebook_size, 1 / cfg.codebook_size)

    def forward(self, z: Tensor) -> Tensor:
        """Vectors (M, codebook_dim) -> codes (M,) long: argmin |z - e|^2, without the |z|^2 that all codes share."""
        e = self.embedding.weight                                                                  # (V, codebook_dim)
        return (e.square().sum(1) - 2 * z @ e.t()).argmin(dim=1)


class VQGAN(nn.Module):
    """Image <-> tokens. `encode` and `decode` are what the rest of the code uses; `forward` is for training."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quantize = Quantizer(cfg)
        self.quant_conv = nn.Conv2d(cfg.vq_latent, cfg.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.codebook_dim, cfg.vq_latent, 1)
        # PyTorch's own start has a third of this variance, and learns several times more slowly.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [-1, 1] -> the vectors to be quantised (B, codebook_dim, G, G). Or any rectangle."""
        if not self.cfg.vq_patchwise:
            return self.quant_conv(self.encoder(pixels))
        b, p = len(pixels), self.cfg.image_size // self.cfg.grid                                   # p: a patch's side
        h, w = pixels.shape[2] // p, pixels.shape[3] // p
        patches = pixels.view(b, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(b * h * w, 3, p, p)
        patches, which = patches.unique(dim=0, return_inverse=True)  # a small world repeats itself: equal ones once
        z = self.quant_conv(self.encoder(patches))[which]                                          # (B*G*G, c, 1, 1)
        return z.view(b, h, w, -1).permute(0, 3, 1, 2)                                             # (B, c, G, G)

    def codes_of(self, z: Tensor) -> Tensor:
        """Features (B, codebook_dim, G, G) -> their nearest codes (B, G*G), in raster order."""
        return self.quantize(z.permute(0, 2, 3, 1).flatten(0, 2)).view(len(z), -1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [-1, 1] -> image tokens (B, G*G) long in [0, V), in raster order. Or any rectangle."""
        return self.codes_of(self.features(pixels))

    def decode(self, image_tokens: Tensor) -> Tensor:
        """Image tokens (B, G*G) -> pixels (B, 3, S, S), about [-1, 1]."""
        return self.paint(self.vectors_of(image_tokens))

    def vectors_of(self, image_tokens: Tensor) -> Tensor:
        """Image tokens (B, G*G) -> their codebook vectors (B, codebook_dim, G, G)."""
        b, g = len(image_tokens), math.isqrt(image_tokens.shape[1])
        return self.quantize.embedding(image_tokens).view(b, g, g, -1).permute(0, 3, 1, 2)

    def paint(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(vectors))

    def forward(self, pixels: Tensor, quantise: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For training: reconstruction (B, 3, S, S), commitment loss, features (B, c, G, G), codes (B, G*G).

        Straight-through: the decoder is fed codebook vectors, its gradient goes to the features as if they were they.
        The codebook itself gets no gradient: Codebook moves it. The commitment loss keeps features near their codes.
        Without quantise it is a plain autoencoder: the decoder is fed the features, and commitment is not asked for.
        """
        z = self.features(pixels)
        codes = self.codes_of(z.detach())
        e = self.vectors_of(codes).detach()
        if not quantise:
            return self.paint(z), torch.zeros((), device=z.device), z, codes
        return self.paint(z + (e - z).detach()), F.mse_loss(z, e), z, codes


class Codebook:
    """Trains a codebook without gradients: each code is the moving average of the features that chose it.

    It starts as the result of k-means, and codes that nothing chooses are moved to features that are badly served:
    otherwise most of a codebook never wakes up.
    """

    def __init__(self, embedding: nn.Embedding, decay: float):
        self.weight, self.decay = embedding.weight, decay
        self.weight.requires_grad_(False)
        self.count = torch.ones(len(self.weight), device=self.weight.device)  # (V,)   features a step that chose each
        self.total = self.weight.detach().clone()                             # (V, c) and their sum

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count, self.total = state["count"].to(self.weight.device), state["total"].to(self.weight.device)

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """k-means on features z (M, c), seeded by k-means++: each new centre far from those there are."""
        v = len(self.weight)
        centres = z[torch.randint(len(z), (1,), generator=generator).to(z.device)]                 # (1, c)
        distance = (z - centres).square().sum(1)                                                   # (M,) to the nearest
        for uniform in torch.rand(v - 1, generator=generator, dtype=torch.float64).to(z.device):
            cumulative = distance.double().cumsum(0)
            place = torch.searchsorted(cumulative, uniform * cumulative[-1:], right=True).clamp(max=len(z) - 1)  # (1,)
            chosen = z[place]                                                                      # (1, c)
            centres = torch.cat([centres, chosen])
            distance = torch.minimum(distance, (z - chosen).square().sum(1))
        self.weight.copy_(centres)
        for _ in range(rounds):
            count, total = self._tally(z, torch.cdist(z, self.weight).argmin(1))
            self.weight.copy_(torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], self.weight))
        self.count, self.total = torch.ones_like(self.count), self.weight.clone()

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """One step with features z (M, c) and the codes (M,) they chose."""
        count, total = self._tally(z, codes)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        # A code dies when, averaged over some steps, it is chosen less than once in about fifty of them.
        is_dead = self.count < 0.02                                                                # (V,)
        error = (z - self.weight[codes]).square().sum(1)                                           # (M,)
        rescue = torch.multinomial(error.cpu() + 1e-12, len(is_dead), replacement=True, generator=generator)
        fresh = z[rescue.to(z.device)]                                                             # (V, c)
        self.count = torch.where(is_dead, 1.0, self.count)
        self.total = torch.where(is_dead[:, None], fresh, self.total)
        self.weight.copy_(self.total / self.count[:, None])

    def _tally(self, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """How many features chose each code (V,), and their sums (V, c)."""
        count = torch.bincount(codes, minlength=len(self.weight)).to(z.dtype)
        return count, torch.zeros_like(self.weight).index_add_(0, codes, z)


def codebook_use(codes: Tensor, codebook_size: int) -> tuple[float, float]:
    """Share of the codebook in use among codes (any shape), and the perplexity exp(entropy) of their distribution."""
    p = torch.bincount(codes.flatten(), minlength=codebook_size).double() / codes.numel()
    return (p > 0).double().mean().item(), torch.exp(-torch.special.xlogy(p, p).sum()).item()
