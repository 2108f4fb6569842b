"""Every setting, once, in one flat dataclass.

A preset is a small table of differences from the defaults below. Every field but text_vocab is a flag of train.py:
`width` is `--width`, `vq_steps` is `--vq-steps`; the comment after a field is also the flag's help. An unknown name is
an error that offers the nearest one. In a comment, `P` is the setting of the paper (MAGVLT, CVPR 2023), and `R` the
setting of the authors' released code, where the paper gives none or another. Read on in masking.py.
"""
import dataclasses
import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from nanomagvlt.masking import ORDERS, SCHEDULES
from nanomagvlt.sequence import TASKS


def decoding(default):
    """A field of sampling, which can change after training. (UnrollMask, too, reads K.) DECODING lists these fields."""
    return field(default=default, metadata={"decoding": True})


def per_task(**numbers: float):
    """A field with a number for each task."""
    return field(default_factory=lambda: dict(numbers))


@dataclass
class Config:
    # Data
    data: str = "shapes:tiny"                # shapes:LEVEL, a folder of images with .txt beside them, or tar shards
    val_data: str = ""                       # validation pairs, in the same forms; empty: held-out shapes, or none
    cache: str = ""                          # a folder of token caches, train/ and val/; empty: make them from the data
    pairs: int = 40_000                      # pairs in a cache of shapes; other data are always read whole
    image_size: int = 32                     # pixels per side; P 256
    fit: str = "crop"                        # images that are not square: crop, squeeze, or pad (with white); P crop
    text_length: int = 24                    # N_T: most text tokens in a caption, its end token included; P 64
    text_bucket: int = 4                     # T of a batch: its longest caption, rounded up to a multiple of this
    # Text tokens
    bpe: str = ""                            # a merges file; empty: train one on the captions
    bpe_merges: int = 100                    # merges to train; vocabulary: 2 x 256 bytes + merges + 2 special; P 48,894
    clean_captions: bool = False             # the release's clean-up of captions, before the cache; R yes
    bpe_dropout: float = 0.0                 # share of merges left undone in training; P 0.1
    text_vocab: int = 0                      # V_T: size of the text vocabulary; 0: from bpe_merges; P 49,408
    # Image tokens: the VQ-GAN, in taming-transformers' terms
    vqgan: str = ""                          # a trained VQ-GAN; empty: train one on the images
    codebook_size: int = 128                 # V_I: image vocabulary; P 16,384
    codebook_dim: int = 32                   # size of a code vector; P 256
    vq_channels: int = 16                    # channels at full resolution; P 128
    vq_multipliers: tuple[int, ...] = (1, 1, 2, 4)  # channels per level, each half the side; P 1,1,2,2,4
    vq_res_blocks: int = 1                   # residual blocks per level (one more in the decoder); P 2
    vq_attention: tuple[int, ...] = ()       # sides of the feature maps that get attention; P 16
    vq_latent: int = 64                      # channels where encoder and decoder meet; P 256
    vq_groups: int = 4                       # groups of each GroupNorm; P 32
    vq_patchwise: bool = True                # the encoder sees one token's patch at a time; P no
    vq_images: int = 20_000                  # images held in memory to train the VQ-GAN
    vq_mixed: float = 0.25                   # share of them that is also joined with another image, as in MixSel
    vq_steps: int = 1000                     # updates
    vq_start: int = 200                      # updates as a plain autoencoder; then k-means starts the codebook
    vq_batch: int = 16                       # images per update
    vq_lr: float = 2e-3                      # peak learning rate
    vq_discriminator: bool = False           # a PatchGAN discriminator (chapter 8); P yes
    vq_discriminator_start: int = 500        # updates before its loss counts
    vq_vgg: str = ""                         # torchvision's vgg16-397923af.pth, for the perceptual loss; empty: none
    vq_lpips: str = ""                       # LPIPS's own vgg.pth, needed with --vq-vgg
    # Transformer
    model: str = "magvlt"                    # magvlt, or argvlt: its autoregressive counterpart (chapter 6)
    segments: bool = False                   # argvlt: an embedding for each half, given or generated (L-Verse)
    layers: int = 4                          # P 24
    width: int = 128                         # D; P 1024
    heads: int = 8                           # H; P 8
    dropout: float = 0.0                     # on residuals and attention; P 0.1
    init_std: float = 0.09                   # weights start as N(0, init_std); R 0.02
    zero_outputs: bool = True                # the last matrices of attention and MLP start as 0, not as N; R no
    position_init: str = "sincos"            # positions start as N(0, init_std) (normal) or as sines; R normal
    text_window: int = 13                    # a word also reads those beside it, so many with itself; P 0 (no others)
    # Objective (eq. 6)
    task_weights: dict[str, float] = per_task(t2i=2.0, i2t=6.0, it2it=1.0)  # how often each is drawn; P 8, 1, 1
    length_weight: float = 0.1               # lambda_TL; P 0.01
    length_pass: str = "own"                 # the length is learned in the main pass, or in its own pass; R main
    length_positions: int = 1                # masked positions in a text's place when its length is predicted; R 16
    length_rows: int = 16                    # pairs of a batch in the length's own pass; 0: all
    unroll_mask: bool = False                # UnrollMask (section 3.3): one more pass, not in IT2IT; P true
    unroll_weight: float = 1.0               # lambda_UM; P 1
    unroll_step: str = "confident"           # UnrollMask's second mask: fresh, next or confident (see chapter 4)
    unroll_temperature: float = 1.0          # at which UnrollMask's guesses are sampled
    unroll_top_k: int = 32                   # ... among this many likeliest tokens; 0: among all
    unroll_text: str = "masked"              # text positions that UnrollMask may mask again: masked (before), or all
    mixsel: str = "off"                      # MixSel (section 3.4): off, select, or random (the control); P select
    mixsel_weight: float = 0.5               # lambda_MS; P 0.5
    mixsel_separators: int = 2               # tokens between two mixed captions; P 1, R 2
    it2it_ratio: str = "opposite"            # mask ratios of image and text: opposite, or the same; R opposite
    label_smoothing: float = 0.0             # P 0.1
    condition_dropout: float = 0.0           # share of given texts left out, as guidance needs (0.1, say); P 0
    # Optimiser
    steps: int = 2000                        # updates; P 40,000
    batch_size: int = 64                     # pairs per update, of all processes together; P 4,096
    micro_batch: int = 0                     # pairs in one pass through the model; 0: the whole batch
    precision: str = "fp32"                  # of matrix products: fp32, bf16 or fp16 (V100, T4); on a GPU, sampling too
    compile: bool = False                    # torch.compile: a slow start, then fewer and larger kernels
    optimizer: str = "muon"                  # adamw, or muon for the blocks' matrices and AdamW for the rest; P adamw
    lr: float = 2e-3                         # peak learning rate; P 4.5e-4
    decay_fraction: float = 0.6              # last share of the updates, in which lr falls to 0 as a cosine; P 1
    warmup: int = 50                         # updates of linear warm-up
    betas: tuple[float, ...] = (0.9, 0.99)   # AdamW; P 0.9, 0.96
    weight_decay: float = 0.045              # on matrices, except embeddings and positions; P 0.045
    grad_clip: float = 4.0                   # largest gradient norm; P 4
    ema: float = 0.998                       # decay of the averaged weights, used to sample, at most step/(step + 10)
    # Decoding (section 3.2)
    image_steps: int = decoding(16)          # K for images; P 10
    image_schedule: str = decoding("cosine") # gamma in decoding, one of masking.SCHEDULES; P cosine
    image_order: str = decoding("gumbel")    # kept first, one of masking.ORDERS; R gumbel
    image_temperature: tuple[float, ...] = decoding((0.3, 0.1))  # sampling temperature, first step and last; R 1.4,0.6
    image_noise: tuple[float, ...] = decoding((0.5, 0.1))  # scale of gumbel's noise, first step and last; R 2,0.2
    image_top_k: int = decoding(0)           # sample among this many likeliest tokens; 0: among all
    guidance: float = decoding(1.0)          # classifier-free guidance of drawings; 1: none
    text_steps: int = decoding(24)           # K for text; P 12
    text_schedule: str = decoding("linear")  # as image_schedule; P linear
    text_order: str = decoding("halton")     # as image_order; inverse masks tokens in proportion to 1/p; R inverse
    text_temperature: tuple[float, ...] = decoding((0.1, 0.1))  # as image_temperature; R 0.1,0.1
    text_noise: tuple[float, ...] = decoding((0.0, 0.0))  # as image_noise
    text_top_k: int = decoding(32)           # as image_top_k; R 32
    pair_text_order: str = decoding("inverse")  # as text_order, where image and text are generated together
    visible_first: bool = decoding(False)    # argvlt: a hole sees all given tokens, not only those to its left; R yes
    # Housekeeping
    seed: int = 0                            # same seed, same device, same result
    log_every: int = 10                      # updates between lines of log.jsonl
    eval_every: int = 1000                   # updates between validations (and best.pt)
    sample_every: int = 2000                 # updates between PNGs of samples
    save_every: int = 1000                   # updates between saves of last.pt
    eval_scenes: int = 200                   # unseen scenes for the accuracies printed at the end, if data is shapes

    def __post_init__(self):
        self.text_vocab = self.text_vocab or 512 + self.bpe_merges + 2

    @property
    def end_token(self) -> int:
        """The text token that ends and pads captions: the last id of the text vocabulary (chapter 9)."""
        return self.text_vocab - 1

    @property
    def patch(self) -> int:
        """Pixels per side of the patch of one image token."""
        return 2 ** max(0, len(self.vq_multipliers) - 1)

    @property
    def grid(self) -> int:
        """G: image tokens per side."""
        return self.image_size // self.patch

    @property
    def image_tokens(self) -> int:
        """N: image tokens of one image, in raster order."""
        return self.grid ** 2

    @property
    def task_shares(self) -> dict[str, float]:
        """The share of the updates that each task gets, without tasks of weight 0."""
        total = sum(self.task_weights.values())
        return {task: weight / total for task, weight in self.task_weights.items() if weight}

    def check(self) -> "Config":
        """Returns itself. Raises ValueError, naming the field, for a value that cannot be used."""
        for limit, (is_right, names) in LIMITS.items():
            for name in names.split():
                value = getattr(self, name)
                numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
                if not all(is_right(x) and math.isfinite(x) for x in numbers):
                    raise ValueError(f"{name} {value} must be {limit}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(choices)}")
        for problem in self.conflicts():
            raise ValueError(problem)
        return self

    def conflicts(self) -> Iterator[str]:
        """The settings that do not go together, a line each."""
        is_causal, mixes = self.model == "argvlt", self.mixsel != "off"
        if unknown := [task for task in self.task_weights if task not in TASKS]:
            yield f"task_weights: no task {unknown[0]!r}{nearest(unknown[0], TASKS)}"
        if not self.task_shares:
            yield f"task_weights {self.task_weights} must not all be 0"
        for name in ("betas", "image_temperature", "text_temperature", "image_noise", "text_noise"):
            if len(getattr(self, name)) != 2:
                yield f"{name} {getattr(self, name)} must be two numbers"
        if not self.vq_multipliers or self.image_size % (2 * self.patch):
            yield (f"image_size {self.image_size} is no multiple of {2 * self.patch}, twice the patch of "
                   f"vq_multipliers {self.vq_multipliers}")
        if self.width % self.heads:
            yield f"width {self.width} is no multiple of heads {self.heads}"
        if self.text_window and (is_causal or self.text_window % 2 == 0):
            yield f"text_window {self.text_window} must be odd, or 0, and 0 with model argvlt"
        if self.position_init == "sincos" and self.width % 4:
            yield f"width {self.width} is no multiple of 4, as position_init sincos needs"
        if absent := set(self.vq_attention) - {self.image_size >> i for i in range(len(self.vq_multipliers))}:
            yield f"vq_attention {min(absent)}: no feature map has this side, see image_size and vq_multipliers"
        if any(self.vq_channels * m % self.vq_groups for m in self.vq_multipliers):
            yield f"vq_channels x vq_multipliers must be multiples of vq_groups {self.vq_groups}"
        if not self.vqgan and self.vq_start >= self.vq_steps:
            yield f"vq_start {self.vq_start} must be below vq_steps {self.vq_steps}, or the codebook is never used"
        if bool(self.vq_vgg) != bool(self.vq_lpips):
            yield "vq_vgg and vq_lpips: the perceptual loss needs both"
        if self.codebook_size > 2 ** 16:
            yield f"codebook_size {self.codebook_size} is over 65,536, the most a cache can hold"
        if is_causal and (not all(TASKS[task].given for task in self.task_shares) or self.unroll_mask
                          or self.condition_dropout):
            yield "model argvlt has no it2it, UnrollMask or condition_dropout"
        if (self.segments or self.visible_first) and not is_causal:
            yield "segments and visible_first need model argvlt"
        if mixes and not 1 <= self.mixsel_separators <= self.text_length - 3:
            yield f"mixsel_separators {self.mixsel_separators} must lie in 1..text_length - 3"
        if not 1 <= self.length_positions <= self.text_length:
            yield f"length_positions {self.length_positions} must lie in 1..text_length {self.text_length}"
        if self.micro_batch and self.batch_size % self.micro_batch:
            yield f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}"
        if self.image_steps > self.image_tokens:
            yield f"image_steps {self.image_steps} is more than the {self.image_tokens} image tokens"
        if self.cache and self.val_data:
            yield "cache has the validation pairs in val/: leave val_data out"
        if self.guidance != 1 and not self.condition_dropout:
            yield f"guidance {self.guidance} needs a model trained with condition_dropout, on empty captions"


LIMITS = {  # what a value must be, a test for it, and the fields
    "at least 0": (lambda x: x >= 0, "bpe_merges vq_start vq_discriminator_start length_weight unroll_weight "
                   "unroll_top_k mixsel_weight micro_batch length_rows text_window warmup weight_decay eval_scenes "
                   "image_top_k text_top_k image_noise text_noise task_weights betas guidance"),
    "at least 1": (lambda x: x >= 1, "pairs image_size text_length text_bucket codebook_size codebook_dim vq_channels "
                   "vq_multipliers vq_res_blocks vq_latent vq_groups vq_images vq_steps vq_batch layers width heads "
                   "steps batch_size image_steps text_steps log_every eval_every sample_every save_every"),
    "above 0": (lambda x: x > 0, "unroll_temperature lr vq_lr grad_clip decay_fraction init_std"),
    "at least 0.001": (lambda x: x >= 0.001, "image_temperature text_temperature"),
    "in [0, 1)": (lambda x: 0 <= x < 1, "label_smoothing dropout ema condition_dropout"),
    "in [0, 1]": (lambda x: 0 <= x <= 1, "bpe_dropout vq_mixed decay_fraction"),
}

CHOICES = {"model": ("magvlt", "argvlt"), "optimizer": ("adamw", "muon"), "mixsel": ("off", "select", "random"),
           "unroll_step": ("fresh", "next", "confident"), "unroll_text": ("masked", "all"),
           "it2it_ratio": ("opposite", "same"), "fit": ("crop", "squeeze", "pad"),
           "length_pass": ("own", "main"), "precision": ("fp32", "bf16", "fp16"), "position_init": ("normal", "sincos"),
           "image_order": ORDERS, "text_order": ORDERS, "pair_text_order": ORDERS,
           "image_schedule": SCHEDULES, "text_schedule": SCHEDULES}

PRESETS = {
    "micro": dict(data="shapes:micro", pairs=4_000, vq_images=4_000, vq_steps=1000, steps=400,
                  task_weights={"t2i": 1.0, "i2t": 1.0, "it2it": 0.0}, eval_scenes=100, eval_every=200,
                  sample_every=200, save_every=200),
    "tiny": dict(),
    # The paper's whole objective and decoding in tiny's world, at tiny's size. Longer texts: MixSel joins two captions.
    "paper": dict(text_length=44, length_weight=0.01, length_pass="main", length_positions=16, unroll_mask=True,
                  mixsel="select", label_smoothing=0.1, steps=1500, image_steps=10, text_steps=12,
                  text_order="inverse", eval_every=500),
    # Between tiny and base: real pictures on one modest GPU, or on a patient CPU. Give it --data.
    "small": dict(data="", image_size=64, text_length=48, text_bucket=8, bpe_merges=2000, bpe_dropout=0.1,
                  codebook_size=512, codebook_dim=64, vq_channels=32, vq_latent=128, vq_groups=8, vq_patchwise=False,
                  vq_steps=4000, vq_start=500, layers=6, width=256, heads=4, dropout=0.1, init_std=0.06,
                  task_weights={"t2i": 2.0, "i2t": 1.0, "it2it": 1.0}, unroll_mask=True, mixsel="select",
                  label_smoothing=0.1, batch_size=32, lr=5e-4, warmup=500, ema=0.999, image_temperature=(1.0, 0.5),
                  image_noise=(1.0, 0.1)),
    "base": dict(data="", image_size=256, text_length=64, text_bucket=16, bpe_merges=48_894, clean_captions=True,
                 bpe_dropout=0.1, codebook_size=16_384, codebook_dim=256, vq_channels=128,
                 vq_multipliers=(1, 1, 2, 2, 4), vq_res_blocks=2, vq_attention=(16,), vq_latent=256, vq_groups=32,
                 vq_patchwise=False, layers=24, width=1024, heads=8, dropout=0.1, init_std=0.02, position_init="normal",
                 length_positions=16, task_weights={"t2i": 8.0, "i2t": 1.0, "it2it": 1.0}, length_weight=0.01,
                 length_pass="main", unroll_mask=True, mixsel="select", label_smoothing=0.1, zero_outputs=False,
                 text_window=0, steps=40_000, batch_size=4096, micro_batch=64, precision="bf16", compile=True,
                 optimizer="adamw", lr=4.5e-4, decay_fraction=1.0, warmup=1000, betas=(0.9, 0.96), ema=0.9999,
                 image_steps=10, image_temperature=(1.4, 0.6), image_noise=(2.0, 0.2), text_steps=12,
                 text_order="inverse"),
}
PRESETS["large"] = dict(PRESETS["base"], layers=36, width=1280, heads=10, steps=80_000)

# The differences that `--model argvlt` adds to any preset. Top-k 256 is R's; it is no limit for tiny's 128 codes.
ARGVLT = dict(text_window=0, task_weights={"t2i": 8.0, "i2t": 2.0, "it2it": 0.0}, unroll_mask=False, mixsel="off",
              image_temperature=(1.0, 1.0), text_temperature=(1.0, 1.0), image_top_k=256)

DECODING = [f.name for f in dataclasses.fields(Config) if "decoding" in f.metadata]

# Fields that a trained VQ-GAN determines.
VQGAN_FIELDS = ("image_size", "codebook_size", "codebook_dim", "vq_channels", "vq_multipliers", "vq_res_blocks",
                "vq_attention", "vq_latent", "vq_groups", "vq_patchwise")

PATHS = ("data", "val_data", "cache", "vqgan", "bpe")  # a run compares what is there, not where it is
# Fields that may change when a run resumes. (Another micro_batch changes dropout and, perhaps, the masks of texts.)
MAY_CHANGE = (*PATHS, "steps", "micro_batch", "compile", "log_every", "eval_every", "sample_every", "save_every",
              "eval_scenes")


def preset(name: str, **changes) -> Config:
    """The named preset with changes. Raises ValueError for an unknown preset or field, with the nearest name."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}{nearest(name, PRESETS)}")
    counterpart = ARGVLT if changes.get("model") == "argvlt" else {}
    return from_dict({**PRESETS[name], **counterpart, **changes})


def from_dict(values: dict) -> Config:
    """A Config from plain values; lists become tuples. Raises ValueError for an unknown field or a bad value."""
    known = {f.name for f in dataclasses.fields(Config)}
    for name in values:
        if name not in known:
            raise ValueError(f"no setting {name!r}{nearest(name, known)}")
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}).check()


def as_json(cfg: Config) -> dict:
    """The settings as JSON gives them back: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def nearest(name: str, names) -> str:
    """'; did you mean ...?' with the closest of names, or all of them where none is close."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names)}"
