"""lm-eval's model around ours."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trsp.pruner.errors import RunError, UserError
from trsp.pruner.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Runner:
    """lm-eval's model around ours, which counts what it does and checks what goes in and out."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int,
        label: str,
        progress: Progress,
    ) -> None:
        import copy

        from lm_eval.models.huggingface import HFLM

        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r}: has neither a begin- nor an end-of-text "
                "token, one of which lm-eval needs; set one in tokenizer_config.json"
            )
        # A copy, because lm-eval sets a padding token.
        self.lm: Any = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        self.num_truncated = 0
        self._label, self._progress = label, progress
        self._done = self._total = 0
        self._tokens_inner = self.lm._loglikelihood_tokens
        self._generate_inner = self.lm.generate_until
        self.lm._loglikelihood_tokens = self._loglikelihoods
        self.lm.loglikelihood = functools.partial(self.lm.loglikelihood, disable_tqdm=True)
        self.lm.loglikelihood_rolling = functools.partial(
            self.lm.loglikelihood_rolling, disable_tqdm=True
        )
        self.lm.generate_until = self._generate
        self.lm._model_call = self._counted(self.lm._model_call)
        self.lm._model_generate = self._counted(self.lm._model_generate)

    def _loglikelihoods(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        room = self.lm.max_length
        for text, context, continuation in requests:
            if not continuation or len(continuation) > room:
                raise UserError(
                    f"task {self._label!r}: {text[1][:60]!r} is {len(continuation)} tokens, "
                    f"expected 1 to {room}, the model's context; leave this item out"
                )
            self.num_truncated += len(context) + len(continuation) > room + 1
        self._begin(len(requests))
        found = self._tokens_inner(requests, *arguments, **options)
        if any(math.isnan(answer[0]) for answer in found):
            raise RunError(f"task {self._label!r}: a log-probability is not a number")
        self._progress(self._label, self._total, self._total)
        return found

    def _generate(self, requests: Any, disable_tqdm: bool = True) -> Any:
        room = self.lm.max_length
        if self.lm.eot_token_id is None:
            raise UserError(
                f"task {self._label!r}: the tokenizer has no end-of-text token, which lm-eval's "
                "generation needs; set eos_token in tokenizer_config.json"
            )
        for request in requests:
            prompt, options = request.args
            new = options.get("max_gen_toks", self.lm.max_gen_toks)
            if new >= room:
                raise UserError(
                    f"task {self._label!r}: wants {new} new tokens, the model's context is {room}"
                )
            self.num_truncated += len(self.lm.tok_encode(prompt)) > room - new
        self._begin(len(requests))
        found = self._generate_inner(requests, disable_tqdm=disable_tqdm)
        self._progress(self._label, self._total, self._total)
        return found

    def _begin(self, count: int) -> None:
        self._done, self._total = 0, count
        self._progress(self._label, 0, count)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            found = call(*arguments, **options)
            # Rows; fewer than requests, because choices of one token share a row.
            self._done += len(found)
            self._progress(self._label, min(self._done, self._total), max(self._total, 1))
            return found

        return counted
