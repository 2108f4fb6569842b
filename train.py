"""Trains a MAGVLT: python train.py --preset tiny

Every stage that is missing is done, every stage that is there is reused, and each says which:
  vqgan    the image tokenizer                       -> runs/NAME/vqgan.pt
  cache    the pairs as tokens                       -> runs/NAME/cache/
  bpe      the captions' byte-pair merges            -> runs/NAME/bpe.txt
  model    the transformer                           -> runs/NAME/last.pt, best.pt, log.jsonl, samples/
Ctrl-C (or SIGTERM) saves and stops; the same command goes on from there, bit for bit as if it had not stopped.
"""
import copy
import dataclasses
import json
import math
import signal
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanomagvlt import checkpoint, metrics, shapes
from nanomagvlt.bpe import BPE
from nanomagvlt.config import MAY_CHANGE, VQGAN_FIELDS, Config, Parser, add_config_flags, config_from_args
from nanomagvlt.data import (DataError, TokenCache, keyed_generator, keyed_seed, left_out, make_batch, read_pairs,
                             rows_of_step, to_images, to_pixels, write_cache, write_json)
from nanomagvlt.generate import Generator, contact_sheet, pick_device
from nanomagvlt.model import MAGVLT, num_parameters
from nanomagvlt.objectives import loss_terms, total_loss
from nanomagvlt.sequence import TASKS
from nanomagvlt.vqgan import VQGAN, Codebook, codebook_use
from nanomagvlt.vqloss import Critic, Perceptual, adversary_share, critic_loss, painter_loss

REFERENCES = Path(__file__).parent / "data" / "results"
STAGES = ("vqgan", "cache", "bpe", "model")
EXAMPLES = """examples:
  python train.py --preset tiny                                    the small world, in minutes on a laptop CPU
  python train.py --preset tiny --name wide --width 192            another run beside it
  python train.py --data 'shards/*.tar' --val-data 'val/*.tar'     your own pairs, as img2dataset writes them
"""


class Stopped(Exception):
    """Ctrl-C or SIGTERM came, and all there is has been saved."""


class Interrupt:
    """Within `with Interrupt() as stop`, the first Ctrl-C or SIGTERM is a flag, stop.came, to be looked at after each
    update; a second one ends at once."""

    def __enter__(self):
        self.came = False
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, number, frame):
        if self.came:
            sys.exit(128 + number)
        self.came = True
        tqdm.write("stopping after this update, and saving ...")

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to 0 at the end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def optimizer_for(model: torch.nn.Module, cfg: Config, lr: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and convolutions only, not on biases, norms, embeddings or positions."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    rest = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": cfg.weight_decay},
                              {"params": rest, "weight_decay": 0.0}], lr=lr, betas=cfg.betas, fused=True)


class Log:
    """One JSON line a record, appended; going on from an earlier step drops the lines after it.

    A last line that a crash cut short, without its newline, is one of those.
    """

    def __init__(self, path: Path, step: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
        self.file = open(path, "a", buffering=1)

    def write(self, **record) -> None:
        self.file.write(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}) + "\n")


# ---------------------------------------------------------------------------------------------- stages

def pairs_of(cfg: Config, split: str, counts: Counter):
    """The pairs to train or to validate on."""
    source = cfg.data if split == "train" or cfg.data.startswith("shapes:") and not cfg.val_data else cfg.val_data
    return read_pairs(source, cfg.image_size, counts, cfg.pairs if split == "train" else 1000, split, cfg.seed)


def get_vqgan(cfg: Config, run: Path, device: torch.device) -> VQGAN:
    """The image tokenizer: given, found, or trained."""
    path = Path(cfg.vqgan or run / "vqgan.pt")
    if cfg.vqgan or path.exists() and checkpoint.load(path, "vqgan")["step"] == cfg.vq_steps:
        print(f"vqgan: reusing {path}")
        return checkpoint.load_vqgan(path).to(device)
    return train_vqgan(cfg, path, device)


def train_vqgan(cfg: Config, path: Path, device: torch.device) -> VQGAN:
    """The image tokenizer, trained on the images of the training pairs (chapter 6); goes on where path stopped."""
    torch.manual_seed(keyed_seed(cfg.seed, "vqgan weights"))
    players, step = Players(cfg, device), 0
    if path.exists():
        step = players.load(checkpoint.load(path, "vqgan"))
    model = players.vqgan

    images = vqgan_images(cfg)                                                                       # (n, S, S, 3)
    print(f"vqgan: {num_parameters(model):,} parameters on {len(images):,} images of {cfg.image_size}x{cfg.image_size}"
          + (f", going on at step {step}" if step else ""))
    log = Log(path.parent / "vqgan_log.jsonl", step)
    with Interrupt() as stop, tqdm(total=cfg.vq_steps, initial=step, desc="vqgan", unit="step") as bar:
        while step < cfg.vq_steps:
            terms, codes = update_vqgan(players, cfg, images, step)
            step += 1
            bar.update()
            if step % cfg.log_every == 0:
                share, perplexity = codebook_use(codes, cfg.codebook_size)
                log.write(step=step, used=share, perplexity=perplexity, **{n: t.item() for n, t in terms.items()})
                bar.set_postfix_str(f"l1 {terms['l1'].item():.4f}, perplexity {perplexity:.1f}, {share:.0%} of codes")
            if step % cfg.save_every == 0 or step == cfg.vq_steps or stop.came:
                checkpoint.save(path, "vqgan", cfg, step=step, **players.state())
            if stop.came and step < cfg.vq_steps:
                raise Stopped(f"{path} at step {step}")
    report_vqgan(model.eval(), cfg, images)
    return model


def vqgan_images(cfg: Config) -> np.ndarray:
    """What the VQ-GAN learns from: uint8 (n, S, S, 3), vq_images training images and, after them, the joined ones.

    MixSel shows the transformer pairs of squeezed images, so the image tokenizer must know such: a share vq_mixed of
    the images is joined with the next one, half of these left|right, half top|bottom.
    """
    pairs = list(islice(pairs_of(cfg, "train", Counter()), cfg.vq_images))
    mixed = round(cfg.vq_mixed * len(pairs))
    joined = [np.concatenate([a.tall, b.tall], 1) if i % 2 else np.concatenate([a.wide, b.wide], 0)
              for i, (a, b) in enumerate(zip(pairs[:mixed], pairs[1:mixed] + pairs[:1]))]
    return np.stack([pair.image for pair in pairs] + joined)


class Players:
    """The VQ-GAN in training, with its codebook, its judges and their optimisers; critic and perceptual may be None."""

    def __init__(self, cfg: Config, device: torch.device):
        self.vqgan = VQGAN(cfg).to(device)
        self.codebook = Codebook(self.vqgan.quantize.embedding, cfg.vq_decay)
        self.optimizer = optimizer_for(self.vqgan, cfg, cfg.vq_lr)
        self.perceptual = Perceptual.load(cfg.vq_vgg, cfg.vq_lpips).to(device) if cfg.vq_vgg else None
        self.critic = Critic(cfg.vq_critic_channels).to(device) if cfg.vq_critic else None
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


def update_vqgan(players: Players, cfg: Config, images: np.ndarray,
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
            codebook.start(as_rows(model.features(first)), keyed_generator(cfg.seed, "codebook start"))

    pixels = to_pixels(images[rows_of_step(step, cfg.vq_batch, len(images), cfg.seed)]).to(device)   # (B, 3, S, S)
    lr = learning_rate(step, cfg.vq_lr, 50, cfg.vq_steps)
    reconstruction, commitment, z, codes = model(pixels, quantise)
    share = adversary_share(step, cfg.vq_critic_start, cfg.vq_critic_ramp)
    loss, terms = painter_loss(pixels, reconstruction, model.decoder.conv_out.weight, players.critic,
                               players.perceptual, share)
    follow(players.optimizer, loss + cfg.vq_commitment * commitment, lr)
    if quantise:
        codebook.update(as_rows(z.detach()), codes.flatten(), keyed_generator(cfg.seed, "codebook", step))
    if players.critic and share > 0:
        loss, more = critic_loss(players.critic, pixels, reconstruction)
        follow(players.critic_optimizer, loss, lr / 4)  # a quarter of the painter's rate: a guess, not tuned
        terms |= more
    return {**terms, "commitment": commitment.detach()}, codes


def follow(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One step down the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
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
    if cfg.data.startswith("shapes:"):
        level = shapes.get_level(cfg.data.removeprefix("shapes:"))
        seen, truth = shapes.read_images(to_images(painted), level), shapes.read_images(images[:500], level)
        right = sum(s.is_clean and s.scene == t.scene for s, t in zip(seen, truth))
        line += f", {right / len(truth):.1%} of reconstructions judged right"
    print(line)


def make_caches(cfg: Config, run: Path, vqgan: VQGAN) -> dict[str, TokenCache]:
    """The token caches of the training and, if there are any, the validation pairs."""
    caches, digest = {}, checkpoint.digest(vqgan)
    for split in ("train", "val"):
        folder = Path(cfg.cache or run / "cache") / split
        if (folder / "meta.json").exists():
            caches[split] = TokenCache(folder)
            print(f"cache: reusing {folder}, {len(caches[split]):,} pairs")
        elif cfg.cache and split == "train":
            raise DataError(f"{folder}: no token cache there; make it with data/prepare.py")
        elif split == "train" or cfg.val_data or cfg.data.startswith("shapes:"):
            counts = Counter()
            pairs = tqdm(pairs_of(cfg, split, counts), desc=f"cache {split}", unit="pair")
            caches[split] = write_cache(folder, pairs, vqgan, {"vqgan": digest, "source": cfg.data},
                                        cfg.clean_captions)
            print(f"cache: {counts['good']:,} pairs -> {folder}{left_out(counts)}")
        if split in caches and caches[split].meta["vqgan"] != digest:
            raise DataError(f"{folder} was made with another VQ-GAN: name the right one with --vqgan, or delete it")
    return caches


def train_bpe(cfg: Config, run: Path, cache: TokenCache) -> BPE:
    """The merges: given, found, or trained on the captions (chapter 8)."""
    path = Path(cfg.bpe) if cfg.bpe else run / "bpe.txt"
    if cfg.bpe or path.exists():
        print(f"bpe: reusing {path}")
        return BPE.load(path)
    bpe = BPE.train((caption for i in range(len(cache)) for caption in cache.captions([i])), cfg.bpe_merges)
    bpe.save(path)
    print(f"bpe: {len(bpe.merges)} merges trained on {len(cache):,} captions -> {path}")
    return bpe


# ---------------------------------------------------------------------------------------------- the transformer

def train_model(cfg: Config, run: Path, caches: dict[str, TokenCache], generator: Generator) -> None:
    """The transformer, by eq. 6 (chapter 4). generator holds the untrained model and the two tokenizers.

    What is validated and sampled is a moving average of the weights, `averaged`; generator ends with it.
    """
    model, bpe = generator.model, generator.bpe
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    generator.model = averaged
    optimizer, step, best = optimizer_for(model, cfg, cfg.lr), 0, math.inf
    if (run / "last.pt").exists():
        state = checkpoint.load(run / "last.pt", "magvlt")
        model.load_state_dict(state["trained"])
        averaged.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best = state["step"], state["best"]
    print(f"model: {num_parameters(model):,} parameters on {len(caches['train']):,} pairs, "
          f"{cfg.steps:,} updates of {cfg.batch_size}" + (f", going on at step {step:,}" if step else ""))

    def save(name):
        checkpoint.save(run / name, "magvlt", cfg, step=step, best=best, model=averaged.state_dict(), bpe=bpe.to_text(),
                        vqgan=generator.vqgan.state_dict(), trained=model.state_dict(),
                        optimizer=optimizer.state_dict())

    before = reference_losses(cfg)
    log, recent = Log(run / "log.jsonl", step), {}  # recent: each task's last loss terms, for the bar
    with Interrupt() as stop, tqdm(total=cfg.steps, initial=step, desc="model", unit="step") as bar:
        while step < cfg.steps:
            task, terms, norm = update_model(model, optimizer, cfg, caches["train"], bpe, step)
            step += 1
            average(averaged, model, min(cfg.ema, step / (step + 10)))
            bar.update()
            if step % cfg.log_every == 0:
                values = {name: term.item() for name, term in terms.items()}
                log.write(step=step, task=task, lr=optimizer.param_groups[0]["lr"], norm=norm.item(), **values)
                recent[task] = f"{task} " + " ".join(f"{value:.3f}" for value in values.values())
                rate = cfg.batch_size * (bar.format_dict["rate"] or 0)
                bar.set_postfix_str(f"{', '.join(sorted(recent.values()))}, {rate:.0f} samples/s")
            if (step % cfg.eval_every == 0 or step == cfg.steps) and "val" in caches:
                losses = validate(averaged, cfg, caches["val"], bpe)
                log.write(step=step, **{f"val_{name}": value for name, value in losses.items()})
                shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
                tqdm.write(f"step {step:,}: validation {shown}" + before.get(step, ""))
                if losses["mask"] < best:
                    best = losses["mask"]
                    save("best.pt")
            if step % cfg.sample_every == 0 or step == cfg.steps:
                save_samples(generator, caches.get("val", caches["train"]), run / "samples" / f"{step:06d}.png")
            if step % cfg.save_every == 0 or step == cfg.steps or stop.came:
                save("last.pt")
            if stop.came and step < cfg.steps:
                raise Stopped(f"{run / 'last.pt'} at step {step:,}")


def update_model(model: MAGVLT, optimizer: torch.optim.Optimizer, cfg: Config, cache: TokenCache, bpe: BPE,
                 step: int) -> tuple[str, dict[str, torch.Tensor], torch.Tensor]:
    """One update of one task, which is drawn here: the task, its loss terms, and the gradient's norm."""
    task = draw_task(cfg, step)
    rows = rows_of_step(step, cfg.batch_size, len(cache), cfg.seed)
    batch = make_batch(cache, bpe, rows, cfg, cfg.bpe_dropout, (cfg.seed, "bpe dropout", step))
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg.lr, cfg.warmup, cfg.steps)

    torch.manual_seed(keyed_seed(cfg.seed, "dropout", step))  # dropout alone uses the global generator
    optimizer.zero_grad()
    terms = {}
    for of_a_pass in loss_terms(model, task, batch, partial(uniform, model.device, cfg.batch_size, cfg.seed, step)):
        total_loss(of_a_pass, task, cfg).backward()  # a sum's gradient is that of its parts: one graph lives at a time
        terms |= {name: term.detach() for name, term in of_a_pass.items()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    optimizer.step()
    return task, terms, norm


def reference_losses(cfg: Config) -> dict[int, str]:
    """What the run in data/results that had these settings, the seed aside, says of its validations: by step."""
    may_differ, said = {*MAY_CHANGE, "seed", "text_vocab"} - {"steps"}, {}
    for path in REFERENCES.glob("*/config.json"):
        theirs = json.loads(path.read_text())
        if all(as_json == theirs.get(name) or name in may_differ
               for name, as_json in json.loads(json.dumps(dataclasses.asdict(cfg))).items()):
            records = map(json.loads, (path.parent / "log.jsonl").read_text().splitlines())
            said |= {record["step"]: f" (mask {record['val_mask']:.3f} in data/results/{path.parent.name})"
                     for record in records if "val_mask" in record}
    return said


@torch.no_grad()
def average(averaged: MAGVLT, model: MAGVLT, decay: float) -> None:
    """averaged = decay x averaged + (1 - decay) x model, weight by weight."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)


def draw_task(cfg: Config, step: int) -> str:
    """The task of an update, T2I : I2T : IT2IT as task_weights; the same wherever it is asked for."""
    weights = torch.tensor(cfg.task_weights)
    return TASKS[int(torch.multinomial(weights, 1, generator=keyed_generator(cfg.seed, "task", step)))]


def uniform(device: torch.device, batch_size: int, seed: int, step: int, purpose: str, *shape: int) -> torch.Tensor:
    """The `draw` of objectives.py: uniform numbers (B, *shape) that depend on the seed, the update and the purpose."""
    return torch.rand(batch_size, *shape, generator=keyed_generator(seed, step, purpose)).to(device)


@torch.no_grad()
def validate(model: MAGVLT, cfg: Config, cache: TokenCache, bpe: BPE) -> dict[str, float]:
    """Mean loss terms of each task on up to 8 batches of unseen pairs, always with the same masks; "mask" adds them up
    by task weight."""
    sums, batches = defaultdict(float), max(1, min(8, len(cache) // cfg.batch_size))
    for i in range(batches):
        rows = rows_of_step(i, cfg.batch_size, len(cache), cfg.seed)
        batch = make_batch(cache, bpe, rows, cfg)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        draw = partial(uniform, model.device, cfg.batch_size, cfg.seed, f"val {i}")
        for task, weight in zip(TASKS, cfg.task_weights):
            if weight:
                for name, term in ((n, t) for terms in loss_terms(model, task, batch, draw) for n, t in terms.items()):
                    sums[task if name == "mask" else f"{task}_{name}"] += term.item() / batches
                    if name == "mask":
                        sums["mask"] += term.item() / batches * weight / sum(cfg.task_weights)
    return dict(sums)


def save_samples(generator: Generator, cache: TokenCache, path: Path) -> None:
    """A PNG: captions of unseen pairs with the pictures drawn for them, then their images with the captions written."""
    rows = np.arange(min(8, len(cache)))
    captions, chance = cache.captions(rows), keyed_generator("samples")
    drawn = generator.draw(captions, chance)
    image_tokens = cache.image_tokens(rows)
    written, _ = generator.caption_tokens(image_tokens, chance)
    images = np.concatenate([drawn, generator.tokens_to_image(image_tokens)])
    path.parent.mkdir(exist_ok=True)
    contact_sheet(images, [f"asked: {c}" for c in captions] + [f"wrote: {c}" for c in written], columns=8).save(path)


# ---------------------------------------------------------------------------------------------- from the command line

def with_tokenizers(cfg: Config, args) -> Config:
    """cfg with what a given VQ-GAN and given merges fix. Raises ValueError where a flag says otherwise."""
    if cfg.vqgan:
        fixed = {name: getattr(checkpoint.load(cfg.vqgan, "vqgan")["config"], name) for name in VQGAN_FIELDS}
        for name, value in fixed.items():
            if getattr(args, name, value) != value:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}, but {cfg.vqgan} has {value}: "
                                 "leave the flag out")
        cfg = dataclasses.replace(cfg, **fixed)
    if cfg.bpe:
        cfg = dataclasses.replace(cfg, text_vocab=BPE.load(cfg.bpe).vocab_size)
    return cfg.check()


def settle(cfg: Config, run: Path) -> None:
    """Makes the run's folder, or checks that the one there was begun with the same settings. Raises DataError."""
    path, settings = run / "config.json", dataclasses.asdict(cfg)
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name in settings if json.loads(json.dumps(settings[name])) != before.get(name)
                   and name not in MAY_CHANGE]
        if changed:
            name = changed[0]
            raise DataError(f"{run} was begun with {name} = {before.get(name)}, now it is {settings[name]}: "
                            "take another --name, or delete the folder")
    run.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="train.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--name", help="the run: runs/NAME (default: the preset's name)")
    parser.add_argument("--stage", choices=STAGES, default="model", help="stop after this stage (default: the last)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    add_config_flags(parser)
    args = parser.parse(argv)
    cfg = config_from_args(parser, args)
    run = Path("runs") / (args.name or args.preset)
    if not cfg.data and not (cfg.cache and cfg.vqgan):
        parser.error(f"preset {args.preset} names no pairs: give --data, or --cache and --vqgan (see data/README.md)")
    try:
        device = pick_device(args.device)
        cfg = with_tokenizers(cfg, args)
        with torch.device("meta"):
            size = num_parameters(MAGVLT(cfg))
        print(f"{device} ({torch.get_num_threads()} threads), preset {args.preset}, transformer of at most {size:,} "
              f"parameters -> {run}/")
        settle(cfg, run)
        stages(cfg, run, device, args.stage)
    except Stopped as what:
        print(f"stopped: {what}; the same command goes on from there")
        sys.exit(130)  # not 0: `train.py && sample.py` is not to go on with half a model
    except KeyboardInterrupt:  # between the training loops; what is unfinished there is done anew
        parser.exit(130, "stopped; the same command goes on from the last finished stage\n")
    except (DataError, checkpoint.CheckpointError, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or run}: {error.strerror or error}")


def stages(cfg: Config, run: Path, device: torch.device, last: str) -> None:
    """All stages in order, up to the last one asked for."""
    started = time.monotonic()
    vqgan = get_vqgan(cfg, run, device).eval().requires_grad_(False)
    if last == "vqgan":
        return
    caches = make_caches(cfg, run, vqgan)
    if last == "cache":
        return
    bpe = train_bpe(cfg, run, caches["train"])
    if last == "bpe":
        return
    cfg = dataclasses.replace(cfg, text_vocab=bpe.vocab_size)
    torch.manual_seed(keyed_seed(cfg.seed, "weights"))
    generator = Generator(MAGVLT(cfg).to(device), vqgan, bpe, cfg)
    train_model(cfg, run, caches, generator)
    minutes = (time.monotonic() - started) / 60
    print(f"trained in {minutes:.1f} minutes -> {run / 'last.pt'}; samples in {run / 'samples'}/")
    if cfg.data.startswith("shapes:"):
        level = shapes.get_level(cfg.data.removeprefix("shapes:"))
        results = metrics.evaluate_scenes(generator, level, cfg.eval_scenes)
        print(metrics.scene_table(results))
        write_json(run / "scenes.json", metrics.as_json(results))
    print('now try: python sample.py --prompt "..."')


if __name__ == "__main__":
    main()
