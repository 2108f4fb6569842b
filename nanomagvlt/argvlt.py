"""Chapter 9 - The counterpart: ARGVLT, the same transformer, but causal (section 4.1, appendix A).

What the paper compares MAGVLT with. The sequence is laid out the same way, nothing is masked, and every place sees only
what stands before it: so it learns to say what comes next, and draws and writes one token after the other. t2i draws
the image after the text, i2t writes the text after the image; there is no it2it, no length to be guessed (the end token
is one of the tokens), and of an image that is partly given only what stands to the left can be seen.

The state at a place guesses the token of the next place. So that the same heads can be used, states are moved one place
to the right: next_states[j] is what the place before j says about j.

Shapes: B batch, N image places, T text places, L sequence, V vocabulary, D width. Read on in shapes.py.
"""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanomagvlt import sequence
from nanomagvlt.rng import random_rows
from nanomagvlt.masking import sample
from nanomagvlt.objectives import bfloat16_if_wanted, masked_cross_entropy

MAIN = "generated"  # the term that validation adds up over the tasks


def total_loss(task: str, cfg, generated: Tensor, condition: Tensor) -> Tensor:
    """The loss over the whole sequence (appendix A): 0.9 on what is generated, 0.1 on the condition."""
    return 0.9 * generated + 0.1 * condition


def loss_terms(model, task: str, batch: dict[str, Tensor], uniform, counts: dict[str, Tensor] | None = None,
               run: Callable | None = None) -> Iterator[dict[str, Tensor]]:
    """The next-token cross entropies of the generated and of the given half, means over their real tokens.

    As objectives.loss_terms(); `uniform` is not needed. Raises ValueError for it2it.
    """
    if task == "it2it":
        raise ValueError("a causal model has no it2it: give task_weights with 0 as their last")
    seq = whole_sequence(task, model.cfg, batch["image_tokens"], batch["text_tokens"], batch["text_lengths"])
    image, text = (run or one_pass)(model, seq, batch, counts["text"] if counts else None,
                                    counts["image"] if counts else None)
    yield {"generated": image, "condition": text} if task == "t2i" else {"generated": text, "condition": image}


def one_pass(model, seq: sequence.Sequence, batch: dict[str, Tensor], num_text: Tensor | None,
             num_image: Tensor | None) -> tuple[Tensor, Tensor]:
    """The cross entropy of the image's tokens and of the text's, means over num_image and num_text of them, or over
    this batch's own."""
    smoothing, where = model.cfg.label_smoothing, seq.layout
    with bfloat16_if_wanted(model.cfg, seq):
        states = next_states(model(seq))                                                             # (B, L, D)
        image = masked_cross_entropy(model.image_logits(states, where), batch["image_tokens"],
                                     seq.is_valid[:, where.image], smoothing, num_image)             # all of it
        text = masked_cross_entropy(model.text_logits(states, where), batch["text_tokens"],
                                    seq.is_valid[:, where.text], smoothing, num_text)
    return image, text


def num_scored(task: str, batch: dict[str, Tensor], uniform, cfg) -> dict[str, Tensor]:
    """How many image and how many text tokens the means are over: () each. As objectives.num_scored()."""
    num_text = batch["text_lengths"].sum()
    return {"text": num_text, "image": torch.full_like(num_text, batch["image_tokens"].numel())}


def whole_sequence(task: str, cfg, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> sequence.Sequence:
    """Image and text with nothing masked."""
    return sequence.build(task, cfg, image_tokens, torch.zeros_like(image_tokens, dtype=torch.bool),
                          text_tokens, torch.zeros_like(text_tokens, dtype=torch.bool), lengths)


def next_states(states: Tensor) -> Tensor:
    """States (B, L, D) one place to the right. The first place, BOC, is asked nothing."""
    return states.roll(1, dims=1)


# ---------------------------------------------------------------------------------------------- sampling

def next_token(model, seq: sequence.Sequence, places: Tensor, cache, modality: str, temperature: float, top_k: int,
               uniform: Tensor) -> Tensor:
    """Reads places (L',), and samples the token (B,) behind the last of them, by uniform numbers (B, 1)."""
    states = model(seq, places, cache)                                                               # (B, L', D)
    logits = model.score(states[:, -1:], modality) / temperature                                     # (B, 1, V)
    return sample(logits, uniform, top_k)[0][:, 0]


@torch.no_grad()
def generate(model, task: str, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor, to_fill: Tensor,
             generator: torch.Generator, temperature: float = 1.0, top_k: int = 0, use_cache: bool = True,
             cache=None, step: Callable = next_token) -> Tensor:
    """Fills the places to_fill of the generated half one by one: image tokens (B, N) in t2i, text tokens (B, T) in i2t.
    What is not to be filled is given, and seen by what stands to its right.

    In i2t a row is over with its first end token: end tokens follow. lengths (B,) are those of the condition in t2i; in
    i2t, how far the text may go. The keys and values of all that has been read are kept (use_cache), in tensors as
    large as the sequence from the start, or worked out again for every token, for comparison: the tokens are the same.
    All randomness is drawn beforehand, row after row. `step` may be a compiled next_token(): all calls but the first
    have the same shapes, and nothing waits. `cache` may be one of an earlier call: what it held is not looked at.
    """
    cfg, modality = model.cfg, "image" if task == "t2i" else "text"
    seq = whole_sequence(task, cfg, image_tokens, text_tokens, lengths)
    half, first_id, end = ((seq.layout.image, 0, -1) if task == "t2i" else
                           (seq.layout.text, cfg.codebook_size, cfg.end_token))           # an image has no end token
    batch, count = to_fill.shape
    uniform = random_rows(generator, batch, count).to(to_fill.device)                       # (B, N) or (B, T)
    is_over = torch.zeros(batch, dtype=torch.bool, device=to_fill.device)                            # (B,)
    places = torch.arange(seq.token_ids.shape[1], device=to_fill.device)                             # (L,)
    cache = (cache or model.new_cache(batch, len(places))) if use_cache else None
    read = 0
    for i in range(count):
        place = half.start + i
        token = step(model, seq, places[read:place], cache, modality, temperature, top_k, uniform[:, i:i + 1])
        read = place if use_cache else 0
        token = token.masked_fill(is_over, end)                                                      # (B,)
        seq.token_ids[:, place] = torch.where(to_fill[:, i], token + first_id, seq.token_ids[:, place])
        is_over = is_over | (seq.token_ids[:, place] == first_id + end)
    return seq.token_ids[:, half] - first_id
