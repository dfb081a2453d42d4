"""What training with ``transformers`` needs beside the model: schedules that move with ``Trainer``, and a tokenizer of bytes."""

from __future__ import annotations

from typing import Any

from gatework.core.contracts import advance

try:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "tokenizers"):
        raise
    raise ModuleNotFoundError('gatework.models.training needs transformers: pip install "gatework[hf]"', name=error.name) from None


class AdvanceSchedules(TrainerCallback):
    """Moves the schedules inside the parts after each optimizer step of a ``transformers.Trainer``.

    Calls ``gatework.core.advance(model, step, total_steps)`` with the trainer's ``global_step`` and ``max_steps``. Without it
    ``gateskip`` stays at the start of its warm-up and never skips in training, loss-free balance biases stay at 0 and
    temperatures at their first value. Schedules are buffers: a checkpoint holds them, and resuming goes on where they were.

    Example:
        >>> from transformers import Trainer
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AdvanceSchedules()])  # doctest: +SKIP
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        advance(kwargs["model"], state.global_step, state.max_steps)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose 256 ids are the byte values of UTF-8 text: that of the bench's ``text`` task.

    Byte 0, which text does not hold, is the begin, end and padding token. Decoding what it encoded gives the same text; a run
    of bytes above 127 that is no UTF-8 becomes U+FFFD, one for each byte. It saves and loads as any tokenizer of ``transformers``.

    Example:
        >>> byte_tokenizer()("né").input_ids
        [110, 195, 169]
    """
    zero = "\0"
    names = {chr(byte) if byte < 128 else f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(names, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=zero, eos_token=zero, pad_token=zero, clean_up_tokenization_spaces=False
    )


__all__ = ["AdvanceSchedules", "byte_tokenizer"]
