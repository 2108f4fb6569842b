"""Appendix - Training the VQ-GAN of chapters 6 and 7: whose turn it is, and what is kept.

train_vqgan() is the loop, update_vqgan() one turn of both players of vqloss.py. The codebook comes in late: until then
the painter is a plain autoencoder. The critic comes in later still, once there is something to criticise.

Shapes: B batch, S image side, G = S / patch.
"""
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanomagvlt.data import shapes
from nanomagvlt.training import checkpoint
from nanomagvlt.rng import keyed_generator, keyed_seed
from nanomagvlt.config import Config
from nanomagvlt.data.cache import Pair, rows_of_step, to_images, to_pixels
from nanomagvlt.training.loop import BAR, Interrupt, Log, Stopped, learning_rate, optimizer_for
from nanomagvlt.model import num_parameters
from nanomagvlt.tokenizers.vqgan import VQGAN, Codebook, codebook_use
from nanomagvlt.tokenizers.vqgan_loss import Discriminator, Perceptual, adversary_share, discriminator_loss, generator_loss


def train_vqgan(cfg: Config, pairs: Iterable[Pair], path: Path, device: torch.device) -> VQGAN:
    """The image tokenizer, trained on the images of the training pairs; goes on where path stopped."""
    torch.manual_seed(keyed_seed(cfg.seed, "vqgan weights"))
    players, step = VQGANTrainer(cfg, device), 0
    if path.exists():
        step = players.load(checkpoint.load(path, "vqgan"))
    model = players.vqgan

    images = vqgan_images(cfg, pairs)                                                                # (n, S, S, 3)
    print(f"vqgan: {num_parameters(model):,} parameters on {len(images):,} images of {cfg.image_size}x{cfg.image_size}"
          + (f", going on at step {step}" if step else ""))
    log = Log(path.parent / "vqgan_log.jsonl", step)
    with Interrupt() as stop, tqdm(total=cfg.vq_steps, initial=step, desc="vqgan", unit="step", **BAR) as bar:
        while step < cfg.vq_steps:
            terms, codes = update_vqgan(players, cfg, images, step)
            step += 1
            bar.update()
            if step % cfg.log_every == 0:
                share, perplexity = codebook_use(codes, cfg.codebook_size)
                log.write(step=step, used=share, perplexity=perplexity, **{n: t.item() for n, t in terms.items()})
                bar.set_postfix_str(f"l1 {terms['l1'].item():.4f}, perplexity {perplexity:.1f}, {share:.0%} of codes",
                                    refresh=False)
            if step % cfg.save_every == 0 or step == cfg.vq_steps or stop.came:
                checkpoint.save(path, "vqgan", cfg, step=step, **players.state())
            if stop.came and step < cfg.vq_steps:
                raise Stopped(f"{path} at step {step}")
    report_vqgan(model.eval(), cfg, images)
    return model


def vqgan_images(cfg: Config, pairs: Iterable[Pair]) -> np.ndarray:
    """What the VQ-GAN learns from: uint8 (n, S, S, 3), vq_images training images and, after them, the joined ones.

    MixSel shows the transformer pairs of squeezed images, so the image tokenizer must know such: a share vq_mixed of
    the images is joined with the next one, half of these left|right, half top|bottom.
    """
    pairs = list(islice(pairs, cfg.vq_images))
    mixed = round(cfg.vq_mixed * len(pairs))
    joined = [np.concatenate([a.tall, b.tall], 1) if i % 2 else np.concatenate([a.wide, b.wide], 0)
              for i, (a, b) in enumerate(zip(pairs[:mixed], pairs[1:mixed] + pairs[:1]))]
    return np.stack([pair.image for pair in pairs] + joined)


class VQGANTrainer:
    """The VQ-GAN in training, with its codebook, its judges and their optimisers; critic and perceptual may be None."""

    def __init__(self, cfg: Config, device: torch.device):
        self.vqgan = VQGAN(cfg).to(device)
        self.codebook = Codebook(self.vqgan.quantize.embedding, cfg.vq_decay)
        self.optimizer = optimizer_for(self.vqgan, cfg, cfg.vq_lr)
        self.perceptual = Perceptual.load(cfg.vq_vgg, cfg.vq_lpips).to(device) if cfg.vq_vgg else None
        self.critic = Discriminator(cfg.vq_discriminator_channels).to(device) if cfg.vq_discriminator else None
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), betas=(0.5, 0.9)) if self.critic else None

    def parts(self) -> dict:
        """What a checkpoint keeps, by name."""
        parts = {"vqgan": self.vqgan, "optimizer": self.optimizer, "codebook": self.codebook}
        return {**parts, "critic": self.critic, "critic_optimizer": self.critic_optimizer} if self.critic else parts

    def state(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load(self, content: dict) -> int:
        """Goes on from a checkpoint; returns its step."""
        for name, part in self.parts().items():
            part.load_state_dict(content[name])
        return content["step"]


def update_vqgan(players: VQGANTrainer, cfg: Config, images: np.ndarray,
                 step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One update of the painter and, once it counts, of the critic (chapter 7): the loss terms, the codes (B, N).

    The first vq_start updates train a plain autoencoder: a codebook laid over features that are still moving fast
    loses most of its codes.
    """
    model, codebook = players.vqgan, players.codebook
    device = model.quantize.embedding.weight.device
    quantise = step >= cfg.vq_start
    if step == cfg.vq_start:
        first = to_pixels(images[rows_of_step(0, min(512, len(images)), len(images), cfg.seed)]).to(device)
        with torch.no_grad():
            at_once = max(1, 2 ** 21 // cfg.image_size ** 2)  # of large images not all, for the memory's sake
            z = torch.cat([model.features(part) for part in first.split(at_once)])
            codebook.start(as_rows(z), keyed_generator(cfg.seed, "codebook start"))

    pixels = to_pixels(images[rows_of_step(step, cfg.vq_batch, len(images), cfg.seed)]).to(device)   # (B, 3, S, S)
    lr = learning_rate(step, cfg.vq_lr, 50, cfg.vq_steps)
    reconstruction, commitment, z, codes = model(pixels, quantise)
    share = adversary_share(step, cfg.vq_discriminator_start, cfg.vq_discriminator_ramp)
    loss, terms = generator_loss(pixels, reconstruction, model.decoder.conv_out.weight, players.critic,
                               players.perceptual, share)
    optimizer_step(players.optimizer, loss + cfg.vq_commitment * commitment, lr)
    if quantise:
        codebook.update(as_rows(z.detach()), codes.flatten(), keyed_generator(cfg.seed, "codebook", step))
    if players.critic and share > 0:
        loss, more = discriminator_loss(players.critic, pixels, reconstruction)
        optimizer_step(players.critic_optimizer, loss, lr / 4)  # a quarter of the painter's rate: a guess, not tuned
        terms |= more
    return {**terms, "commitment": commitment.detach()}, codes


def optimizer_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One step down the loss. Raises ValueError, before anything is changed, where the gradient is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not torch.nn.utils.get_total_norm(gradients).isfinite():
        raise ValueError("the gradient of the VQ-GAN is not finite: try a smaller --vq-lr, under another --name")
    optimizer.step()


def as_rows(z: torch.Tensor) -> torch.Tensor:
    """Features (B, c, G, G) -> vectors (B*G*G, c)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


@torch.inference_mode()
def report_vqgan(vqgan: VQGAN, cfg: Config, images: np.ndarray) -> None:
    """How well up to 500 training images survive being turned into tokens and back."""
    pixels = to_pixels(images[:500]).to(vqgan.quantize.embedding.weight.device)
    codes = torch.cat([vqgan.encode(part) for part in pixels.split(100)])
    painted = torch.cat([vqgan.decode(part) for part in codes.split(100)])
    share, perplexity = codebook_use(codes, cfg.codebook_size)
    psnr = 10 * math.log10(4 / (painted.clamp(-1, 1) - pixels).square().mean().item())
    used = f"{round(share * cfg.codebook_size)} of {cfg.codebook_size} codes used"
    line = f"vqgan: PSNR {psnr:.1f} dB, {used}, perplexity {perplexity:.1f}"
    if level := shapes.level_of(cfg.data):
        seen, truth = shapes.read_images(to_images(painted), level), shapes.read_images(images[:500], level)
        right = sum(s.is_clean and s.scene == t.scene for s, t in zip(seen, truth))
        line += f", {right / len(truth):.1%} of reconstructions judged right"
    print(line)
