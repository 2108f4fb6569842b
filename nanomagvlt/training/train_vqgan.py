"""Appendix - Training the VQ-GAN of chapters 7 and 8: the loop, and one update of generator and discriminator.

At first the VQ-GAN is a plain autoencoder. From update `vq_start` on, its features are quantised. From update
`vq_discriminator_start` on, the discriminator is trained, and is part of the generator's loss.

Shapes: B batch, n images, S image side, N tokens of an image, c = codebook_dim.
"""
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanomagvlt.config import Config
from nanomagvlt.data.cache import Example, rows_of_step, to_pixels
from nanomagvlt.io import one_line_error
from nanomagvlt.model import num_parameters
from nanomagvlt.rng import keyed_generator, keyed_seed
from nanomagvlt.tokenizers import vqgan_loss
from nanomagvlt.tokenizers.vqgan import VQGAN, Codebook, codebook_use
from nanomagvlt.training import checkpoint
from nanomagvlt.training.loop import BAR, Interrupt, Log, Stopped, learning_rate, optimizer_for

COMMITMENT_WEIGHT = 0.25   # of the commitment loss
CODEBOOK_DECAY = 0.95      # of the codebook's moving averages, per update
DISCRIMINATOR_WIDTH = 64   # channels of its first layer
DISCRIMINATOR_RAMP = 200   # updates in which the weight of the adversarial loss rises from 0 to 1


def train_vqgan(cfg: Config, examples: Iterable[Example], path: Path, device: torch.device) -> VQGAN:
    """Trains a VQ-GAN on the images of examples and returns it in evaluation mode. Resumes from path if it exists."""
    torch.manual_seed(keyed_seed(cfg.seed, "vqgan weights"))
    trainer = VQGANTrainer(cfg, device)
    step = trainer.load(path) if path.exists() else 0
    images = vqgan_images(cfg, examples)                                                                # (n, S, S, 3)
    print(f"vqgan: {num_parameters(trainer.vqgan):,} parameters, {len(images):,} images"
          + (f", going on at step {step}" if step else ""))
    log = Log(path.parent / "vqgan_log.jsonl", step)
    with Interrupt() as stop, tqdm(total=cfg.vq_steps, initial=step, desc="vqgan", unit="step", **BAR) as bar:
        while step < cfg.vq_steps:
            terms, codes = update_vqgan(trainer, images, step)
            step += 1
            bar.update()
            if step % cfg.log_every == 0:
                share, perplexity = codebook_use(codes, cfg.codebook_size)
                log.write(step=step, used=share, perplexity=perplexity, **{n: t.item() for n, t in terms.items()})
                bar.set_postfix_str(f"l1 {terms['l1'].item():.4f}, {share:.0%} of codes used", refresh=False)
            if step % cfg.save_every == 0 or step == cfg.vq_steps or stop.came:
                checkpoint.save(path, "vqgan", cfg, step=step, **{n: p.state_dict() for n, p in trainer.parts.items()})
            if stop.came and step < cfg.vq_steps:
                raise Stopped(f"{path} at step {step}")
    report_vqgan(trainer.vqgan.eval(), cfg, images)
    return trainer.vqgan


def vqgan_images(cfg: Config, examples: Iterable[Example]) -> np.ndarray:
    """The images that train the VQ-GAN, uint8 (n, S, S, 3): those of the first `vq_images` examples, then joined ones.
    MixSel trains the transformer on joined images, so the VQ-GAN must learn them: a share `vq_mixed` of the images is
    squeezed and joined with the next image, half of them left|right, half top|bottom."""
    examples = list(islice(examples, cfg.vq_images))
    mixed = examples[:round(cfg.vq_mixed * len(examples))]
    joined = [np.concatenate([a.tall, b.tall], 1) if i % 2 else np.concatenate([a.wide, b.wide], 0)
              for i, (a, b) in enumerate(zip(mixed, mixed[1:] + examples[:1]))]
    return np.stack([example.views[0] for example in examples] + joined)


class VQGANTrainer:
    """The VQ-GAN with its codebook, losses and optimisers. A checkpoint contains the state of each of the `parts`."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg, self.vqgan = cfg, VQGAN(cfg).to(device)
        self.codebook = Codebook(self.vqgan.quantize.embedding, CODEBOOK_DECAY)
        self.optimizer = optimizer_for(self.vqgan, cfg, cfg.vq_lr)
        self.parts = {"vqgan": self.vqgan, "optimizer": self.optimizer, "codebook": self.codebook}
        self.perceptual = vqgan_loss.Perceptual.load(cfg.vq_vgg, cfg.vq_lpips).to(device) if cfg.vq_vgg else None
        self.discriminator = vqgan_loss.Discriminator(DISCRIMINATOR_WIDTH).to(device) if cfg.vq_discriminator else None
        if self.discriminator:
            self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), betas=(0.5, 0.9))
            self.parts |= {"discriminator": self.discriminator, "discriminator_optimizer": self.discriminator_optimizer}

    def load(self, path: Path) -> int:
        """Resumes from a checkpoint and returns its step. Raises ValueError if it lacks a part or has other sizes."""
        content = checkpoint.load(path, "vqgan")
        with one_line_error(path, "training cannot go on: give it with --vqgan, or take another --name"):
            for name, part in self.parts.items():
                part.load_state_dict(content[name])
            return content["step"]


def update_vqgan(trainer: VQGANTrainer, images: np.ndarray, step: int) -> tuple[dict, torch.Tensor]:
    """One update of the generator and, once it counts, of the discriminator. Returns loss terms and codes (B, N)."""
    cfg, vqgan, codebook, device = trainer.cfg, trainer.vqgan, trainer.codebook, trainer.codebook.weight.device
    if step == cfg.vq_start:
        first = to_pixels(images[rows_of_step(0, min(512, len(images)), len(images), cfg.seed)]).to(device)
        with torch.no_grad():  # in parts, to save memory
            z = torch.cat([vqgan.features(part) for part in first.split(max(1, 2 ** 21 // cfg.image_size ** 2))])
        codebook.start(z.mT.flatten(0, 1), keyed_generator(cfg.seed, "codebook start"))

    pixels = to_pixels(images[rows_of_step(step, cfg.vq_batch, len(images), cfg.seed)]).to(device)   # (B, 3, S, S)
    quantise = step >= cfg.vq_start  # earlier the features move too fast: most of the codebook would fall out of use
    reconstruction, commitment, z, codes = vqgan(pixels, quantise)                                   # z (B, c, N)
    share = min(1.0, (step + 1 - cfg.vq_discriminator_start) / DISCRIMINATOR_RAMP)
    discriminator = trainer.discriminator if share > 0 else None
    loss, terms = vqgan_loss.generator_loss(pixels, reconstruction, vqgan.decoder.conv_out.weight, trainer.perceptual,
                                            discriminator, share)
    lr = learning_rate(step, cfg.vq_lr, 50, cfg.vq_steps)                                            # 50: warm-up
    optimizer_step(trainer.optimizer, loss + COMMITMENT_WEIGHT * commitment, lr)
    if quantise:
        codebook.update(z.detach().mT.flatten(0, 1), codes.flatten(), keyed_generator(cfg.seed, "codebook", step))
    if discriminator:
        loss, logits = vqgan_loss.discriminator_loss(discriminator, pixels, reconstruction)
        optimizer_step(trainer.discriminator_optimizer, loss, lr / 4)  # a quarter of the generator's: not tuned
        terms |= logits
    return {**terms, "commitment": commitment}, codes


def optimizer_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """Backward pass and one step. Raises ValueError, and changes no weight, if the gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
        if not torch.nn.utils.get_total_norm([p.grad for p in group["params"]]).isfinite():
            raise ValueError("the gradient of the VQ-GAN is not finite: try a smaller --vq-lr, under another --name")
    optimizer.step()


@torch.inference_mode()
def report_vqgan(vqgan: VQGAN, cfg: Config, images: np.ndarray) -> None:
    """Prints how well up to 500 training images are reconstructed from their tokens."""
    pixels = to_pixels(images[:500]).to(vqgan.quantize.embedding.weight.device)                      # (n, 3, S, S)
    codes = torch.cat([vqgan.encode(part) for part in pixels.split(100)])                            # (n, N)
    decoded = torch.cat([vqgan.decode(part) for part in codes.split(100)])                           # (n, 3, S, S)
    psnr = 10 * math.log10(4 / (decoded.clamp(-1, 1) - pixels).square().mean().item())
    share, perplexity = codebook_use(codes, cfg.codebook_size)
    print(f"vqgan: PSNR {psnr:.1f} dB, {share:.0%} of {cfg.codebook_size} codes used, perplexity {perplexity:.1f}")
