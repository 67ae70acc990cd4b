"""Which calibration sequences a training step sees: a pure function of seed and step.

No random state to save: a resumed run asks for the same step and gets the same sequences.
"""

import torch


def batch_indices(step: int, *, num_sequences: int, batch_size: int, seed: int) -> list[int]:
    """Indices of the sequences of optimizer step `step`, reshuffled every epoch by `seed`."""
    indices = []
    permutations: dict[int, list[int]] = {}
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_sequences)
        if epoch not in permutations:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutations[epoch] = torch.randperm(num_sequences, generator=generator).tolist()
        indices.append(permutations[epoch][offset])
    return indices
