"""Every number of the cost model that is neither a model's shape nor a card's datasheet, with its unit and its source.

"H200" below means measured on one NVIDIA H200 with torch 2.11 and CUDA 13 (``benchmarks/results/h200``,
``docs/log.md``); "counted" means read off the code of the fused layer; "guess" means not measured yet.
"""

from __future__ import annotations

GIB = 1 << 30
MIB = 1 << 20

# --- What share of its datasheet a card reaches ---------------------------------------------------------------------

MATRIX_SHARE = 0.708
"""Of dense bf16 FLOP/s, at the shapes of an 8B model: 700 of 989 TFLOP/s. H200: 57.2 TFLOP of linears in 81.7 ms."""

COPY_SHARE = 0.894
"""Of memory bandwidth, device copy (read + write): 4.29 of 4.8 TB/s. H200."""

LINK_SHARE = 0.873
"""Of the host link's raw rate, one way or both, pinned memory: 55 of 63 GB/s. H200."""

ATTENTION_FORWARD_SHARE = ((512, 0.33), (2048, 0.526), (32768, 0.609))
"""(row length, share of dense bf16 FLOP/s), causal attention forward by cuDNN. H200: 520 TFLOP/s at 2,048 (from 2 and 8
rows, without the call's own time), 602 at 32,768; at 512 a guess."""

ATTENTION_BACKWARD_SHARE = ((512, 0.24), (2048, 0.389), (32768, 0.553))
"""The same of the backward pass alone. H200: 384 TFLOP/s at 2,048, 547 at 32,768; at 512 a guess."""

ATTENTION_CALL_SECONDS = (58e-6, 153e-6)
"""Seconds of a call of attention beside its products, forward and backward. H200: 2 and 8 rows of 2,048."""

# --- Time -----------------------------------------------------------------------------------------------------------

WEIGHT_READ_SHARE = 0.74
"""Of copy bandwidth, at which a product with few tokens reads its weight: 13.96 GB in 4.4 ms. H200."""

ELEMENTWISE_SHARE = 0.85
"""Of copy bandwidth, over norms, GLU, rotation and the LoRA products, which move bytes more than they compute. H200:
RMSNorm 0.70, GLU 0.97."""

DEQUANTIZE_SHARE = 0.83
"""Of copy bandwidth: NF4 to 16 bits of a 14336 x 4096 weight. H200."""

DEQUANTIZE_EXPOSED = 1.0
"""Share of the dequantizing time that is not hidden behind the matrix product before it. Guess: nothing hidden."""

ATTENTION_BACKWARD_FLOPS = 2.5
"""Backward over forward: five matrix products instead of two (FlashAttention-2, arXiv:2307.08691)."""

LORA_FORWARD_PASSES = (1.0, 2.0)
"""How often a projection's input and its output pass memory for LoRA: ``x A^T`` reads x; the sum reads, writes y.
Counted."""

LORA_BACKWARD_PASSES = (3.0, 2.0)
"""The same in backward: ``dx += g A`` reads and writes dx, ``g^T x`` reads x; ``dy B`` and ``dy^T l`` read dy.
Counted."""

HEAD_PASSES = 4.0
"""How often a chunk's float32 logits pass memory: written, read for the sum, turned to gradients, read. Counted."""

FORWARD_LAUNCHES = 46
"""GPU launches of one fused layer's forward with seven adapters. Counted."""

BACKWARD_LAUNCHES = 110
"""The same of its backward, with nothing recomputed. Counted."""

TILE_LAUNCHES = 40
"""More launches for each further tile of a tiled MLP, forward and backward. Counted."""

LAUNCH_SECONDS = 8e-6
"""Seconds of the host for one launch, Python included. Guess."""

OPTIMIZER_TENSOR_SECONDS = {"bitsandbytes": 6e-6, "torch": 5e-6}
"""Seconds of clipping and optimizer for each trained tensor. 8-bit states as :mod:`pronghorn.optim` steps them, all in
one launch: 2.8 ms for 448 on an H200 (bitsandbytes' own classes wait for the GPU after each tensor: 26 to 35 ms);
torch's, a guess."""

STEP_SECONDS = 1e-3
"""Seconds of a step that belong to no layer: embedding, packing, waiting for the labels. Guess."""

# --- Bytes ----------------------------------------------------------------------------------------------------------

WEIGHT_BUFFERS = 2
"""Dequantized weights alive at once where one input has several: this product's and the next one's. Counted."""

ATTENTION_WORKSPACE_BYTES = 4
"""Bytes of workspace for each element of q in attention's backward: a float32 sum of dq (FlashAttention-2)."""

OFFLOADS_LEAVING = 2
"""Layers whose kept tensors are on their way to the host besides the one at work (``offload.IN_FLIGHT``)."""

OFFLOADS_COMING = 1
"""Layers whose kept tensors are on their way back besides the one at work: the one before it. Counted."""

HEAD_HIDDEN = 4
"""``[N, D]`` tensors at the head: before and after the final norm, the scored rows, their gradient. Counted."""

HEAD_CHUNK_ELEMENTS = 1 << 26
"""Float32 logits alive at once (``kernels/head.py``)."""

UNFUSED_HIDDEN, UNFUSED_QUERY, UNFUSED_KEY, UNFUSED_INNER = 7, 4, 4, 5
"""``[T, D]``, ``[T, H*E]``, ``[T, K*E]`` and ``[T, I]`` tensors that autograd keeps of a layer that runs by its own
sub-modules. Counted on transformers' Llama under PEFT."""

RESERVE_SHARE = 0.02
"""Of the memory that may be used, left free for fragmentation and libraries' workspaces. Guess."""

RESERVE_BYTES = 256 * MIB
"""Left free besides."""

CONTEXT_BYTES = 600 * MIB
"""CUDA context and loaded kernels, which no allocator counts; for cards that are planned for, not sat at. Guess."""

HOST_SHARE = 0.5
"""Of the host's available memory, what offloaded tensors may take; pinned memory cannot be swapped out."""

PLANNED_HOST_BYTES = 128 * GIB
"""Main memory available beside a card that is planned for, not sat at."""

UNKNOWN_OPTIMIZER_BYTES = 8
"""Of state for each trained parameter, left free until the first optimizer step shows what it takes: AdamW's."""

# --- Choosing -------------------------------------------------------------------------------------------------------

PEAK_UNCERTAINTY = 0.05
"""Of a step's own bytes: a plan is taken only if a peak higher by this would fit too."""

PEAK_EQUAL = 0.001
""""memory" takes peaks that differ by less than this share for equal, and then the faster plan."""

MEMORY_SLACK = 0.03
"""What "memory" may cost in time over the fastest plan that keeps next to nothing on the GPU."""

TILE_ROWS = (8192, 4096)
"""Rows of an MLP tile to choose from; below 4,096 the matrix products lose their rate."""
