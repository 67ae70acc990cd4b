"""Two training-free methods that put what is to be removed into weights that stay.

Both change the model in place and return the layers that then have to go: the layers removed are
skipped, not deleted, when they return. LaCo adds the layers' differences to a layer before them;
ReplaceMe folds a fitted linear map into the projection that ends the MLP before the block.

L layers, N sequences, T tokens, D hidden size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trsp.bench.baseline_orders import NotApplicableError, block_cosines, check_number
from trsp.pruner.activations import last_projection, matrix_of, residual_stream, watching
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import require_finite
from trsp.pruner.progress import Progress, silent

# So many layers become one in a merge: the paper's number for models of 32 layers.
LACO_MERGED_LAYERS = 4
# Share of the mean diagonal of M^T M; enough for a solution when there are fewer tokens than D.
REPLACE_ME_RIDGE = 1e-6


@torch.no_grad()
def laco_merge(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    batch_size: int = 4,
    progress: Progress = silent,
) -> tuple[int, ...]:
    """Merge layers into one before them until `num_to_remove` are merged away.

    A merge at l is the paper's: W_l + sum over k = 1..m of (W_{l+k} - W_l), for every parameter,
    where l+1..l+m are the next m layers still there. m is 3 (four layers become one), and what is
    left to remove in the last merge. Which merge is taken differs: the paper walks down from the
    top, takes every merge whose similarity passes a threshold, and ends at whatever depth that
    gives; here each round tries every position and takes the merge with the highest similarity,
    so that exactly `num_to_remove` layers go and no threshold is tuned. There is no least distance
    between merges: a merged layer may be merged again. The similarity is the release's: the
    cosine, per sequence and over all its tokens at once, of the final hidden states to the dense
    model's, averaged over sequences.

    With m = 1 the formula is W_l = W_{l+1}: a merge of two layers drops the first of them. (The
    release adds each difference to the weights already added to, so it ends at W_{l+m} for any m,
    and it leaves norms as they are; here it is the paper's formula and every parameter.)

    Source: LaCo, arXiv 2402.11187.

    Args:
        gated: entered; weights are changed in place.
        input_ids: calibration tokens [N, T]; the dense model's final hidden states for them are
            kept on the CPU, N * T * D elements.
    Returns:
        The layers that go, in the order in which they were merged away.
    Raises:
        UserError: num_to_remove is not in 1..L-1, or the layers' parameters differ in name or
            shape. RunError: a similarity that is not finite.
    """
    check_number(gated, num_to_remove)
    _require_same_parameters(gated)
    dense = [
        hidden.cpu() for hidden in _final_hidden_states(gated, input_ids, frozenset(), batch_size)
    ]
    removed: tuple[int, ...] = ()
    while len(removed) < num_to_remove:
        merged = min(LACO_MERGED_LAYERS - 1, num_to_remove - len(removed))
        alive = [layer for layer in range(gated.num_layers) if layer not in removed]
        similarities = {}
        for position in range(len(alive) - merged):
            base, *others = alive[position : position + merged + 1]
            saved = [parameter.clone() for parameter in gated.layers[base].parameters()]
            _merge(gated, base, others)
            try:
                similarities[position] = _similarity(
                    gated, input_ids, dense, frozenset((*removed, *others)), batch_size
                )
            finally:
                _load(gated.layers[base], saved)
            require_finite(similarities[position], f"the similarity merged at {base}", 0, [])
            progress(
                f"LaCo, {len(removed)}/{num_to_remove} merged", position + 1, len(alive) - merged
            )
        best = max(similarities, key=lambda position: similarities[position])
        base, *others = alive[best : best + merged + 1]
        _merge(gated, base, others)
        removed = (*removed, *others)
    return removed


@torch.no_grad()
def replace_me(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    batch_size: int = 4,
    progress: Progress = silent,
) -> tuple[int, ...]:
    """Replace a contiguous block by a linear map, folded into the MLP of the layer before it.

    The block has the highest mean cosine over all tokens between what enters and what leaves it;
    it never starts at layer 0, before which no MLP stands. With M the MLP output of the layer
    before it, Y that layer's output without M, Z the block's output, T minimises
    ||M T + Y - Z||^2 + ridge * ||T||^2, in fp64 and closed form, and W of the MLP's last
    projection becomes T^T W, its bias, where it has one, T^T b. No bias is added. This is the
    method's least-squares variant; its variant trained on cosine distance is not here.

    Source: ReplaceMe, arXiv 2505.02819.

    Args:
        gated: entered; one weight is changed in place.
        input_ids: calibration tokens [N, T].
    Returns:
        The layers that go, the deepest first.
    Raises:
        UserError: num_to_remove is not in 1..L-1, or the MLP before the block has no last
            projection: no linear layer makes the very output that enters the residual stream, as
            when a norm or a gate stands behind it. Dropout is the identity here and may stand
            there. RunError: a cosine or the map is not finite.
    """
    check_number(gated, num_to_remove)
    cosines = block_cosines(
        gated, input_ids, length=num_to_remove, batch_size=batch_size, progress=progress
    )
    first = max(range(1, len(cosines)), key=lambda start: cosines[start])
    before, last = first - 1, first + num_to_remove - 1
    projection = last_projection(gated, before, input_ids[:1])
    if projection is None:
        raise NotApplicableError(
            f"layer {before} has no MLP that ends in one linear projection: a linear map cannot "
            "be folded into it"
        )
    matrix = matrix_of(projection)
    size = len(matrix)
    gram = torch.zeros(size, size, dtype=torch.float64, device=matrix.device)
    moments = torch.zeros_like(gram)
    for start in range(0, len(input_ids), batch_size):
        with watching([projection]) as seen:
            stream = residual_stream(gated, input_ids[start : start + batch_size])
        mlp = seen.outputs[projection].reshape(-1, size).double()
        # Z - Y, Y being the output of the layer before without its MLP.
        target = stream[last + 1].reshape(-1, size).double()
        target = target - stream[first].reshape(-1, size).double() + mlp
        gram += mlp.T @ mlp
        moments += mlp.T @ target
        progress("ReplaceMe", min(start + batch_size, len(input_ids)), len(input_ids))
    # An MLP that gives nothing but zeros leaves nothing to solve, and no map is needed.
    ridge = max(REPLACE_ME_RIDGE * float(gram.diagonal().mean()), 1e-30)
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    transform = torch.linalg.solve(gram + ridge * eye, moments)
    require_finite(float(transform.abs().sum()), f"the linear map for layer {first} on", 0, [])
    matrix.copy_(transform.T @ matrix.double())
    if projection.bias is not None:
        projection.bias.copy_(transform.T @ projection.bias.double())
    return tuple(range(last, first - 1, -1))


def _require_same_parameters(gated: GatedModel) -> None:
    shapes = [
        {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        for layer in gated.layers
    ]
    for layer, other in enumerate(shapes):
        if other != shapes[0]:
            raise NotApplicableError(
                f"layer {layer} has other parameters than layer 0: layers of one kind can be "
                "merged, these cannot"
            )


def _merge(gated: GatedModel, base: int, others: list[int]) -> None:
    """W_base += sum of (W_other - W_base), summed in fp32."""
    sources = [dict(gated.layers[other].named_parameters()) for other in others]
    for name, parameter in gated.layers[base].named_parameters():
        own = parameter.float()
        parameter.copy_(own + sum((source[name].float() - own for source in sources), 0 * own))


def _load(layer: nn.Module, saved: list[Tensor]) -> None:
    for parameter, value in zip(layer.parameters(), saved, strict=True):
        parameter.copy_(value)


def _final_hidden_states(
    gated: GatedModel, input_ids: Tensor, removed: frozenset[int], batch_size: int
) -> Iterator[Tensor]:
    """What enters the output head, batch by batch, [B, T, D]."""
    for start in range(0, len(input_ids), batch_size):
        batch = input_ids[start : start + batch_size].to(gated.model.device)
        with gated.masking(removed):
            hidden = gated.model.base_model(input_ids=batch, use_cache=False)[0]
        yield hidden


def _similarity(
    gated: GatedModel,
    input_ids: Tensor,
    dense: list[Tensor],
    removed: frozenset[int],
    batch_size: int,
) -> float:
    total = 0.0
    hidden_states = _final_hidden_states(gated, input_ids, removed, batch_size)
    for hidden, reference in zip(hidden_states, dense, strict=True):
        there = reference.to(hidden.device).float().flatten(1)
        total += float(F.cosine_similarity(hidden.float().flatten(1), there, dim=-1).sum())
    return total / len(input_ids)
