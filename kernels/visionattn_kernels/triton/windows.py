"""Device functions that the windowed operators share: `ops/windows.py` and its inverse, in Triton.

A map (H, W) with a dilation is a set of smaller maps, one for each pair of residues; positions within such a map are
members, and windows hold consecutive members. All pairs are (rows, columns).
"""

import triton
import triton.language as tl

from visionattn_kernels.triton.rows import load_rows, store_rows


@triton.jit
def window_start(place, members, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """First member of the window of the query at `place`, on an axis of `members`."""
    centre = tl.minimum(place // STRIDE * STRIDE + STRIDE // 2, members - 1)
    return tl.minimum(tl.maximum(centre - KERNEL // 2, 0), members - KERNEL)


@triton.jit
def first_query(start, members, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """First member whose window starts at `start` or later; `members` where none does.

    Window starts never decrease along an axis, hence the queries whose window holds a key of [first, end) are those
    from `first_query(first - K + 1)` up to `first_query(end)`, without a gap.
    """
    group = tl.cdiv(tl.maximum(start, 1) + KERNEL // 2 - STRIDE // 2, STRIDE)
    place = tl.where(start > members - KERNEL, members, tl.minimum(group * STRIDE, members))
    return tl.where(start <= 0, 0, place)


@triton.jit
def locate(size, dilation, heads, TILE: tl.constexpr):
    """What this program owns: one tile of one residue map of one head.

    Neighbouring programs own neighbouring tiles, which share most of what they read.

    Returns:
        plane: The residue map: batch, head, residues (2), dilation (2); for `member_pointers`.
        members: Size of the residue map.
        first: First member of the tile; beyond the map where other residue maps are longer.
    """
    tiles_y = tl.cdiv(tl.cdiv(size[0], dilation[0]), TILE[0])
    tiles_x = tl.cdiv(tl.cdiv(size[1], dilation[1]), TILE[1])
    program = tl.program_id(0)
    first_x = program % tiles_x * TILE[1]
    first_y = program // tiles_x % tiles_y * TILE[0]
    rest = program // (tiles_x * tiles_y)
    residue_x = rest % dilation[1]
    residue_y = rest // dilation[1] % dilation[0]
    rest = rest // (dilation[0] * dilation[1])
    members_y = (size[0] - residue_y + dilation[0] - 1) // dilation[0]
    members_x = (size[1] - residue_x + dilation[1] - 1) // dilation[1]
    plane = (rest // heads, rest % heads, residue_y, residue_x, dilation[0], dilation[1])
    return plane, (members_y, members_x), (first_y, first_x)


@triton.jit
def tile_places(first_y, first_x, TILE: tl.constexpr):
    """Rows and columns of the members of the tile at (first_y, first_x), row-major: a pair of [BLOCK]."""
    index = tl.arange(0, TILE[0] * TILE[1])
    return first_y + index // TILE[1], first_x + index % TILE[1]


@triton.jit
def before(places, end):
    """[BLOCK] which members lie before `end` on both axes."""
    return (places[0] < end[0]) & (places[1] < end[1])


@triton.jit
def member_pointers(ptr, places, plane, strides):
    """[BLOCK] pointers to members of a plane of a map with `strides` (batch, head, row, column, ...).

    Offsets have 64 bits: a batch of maps, and even one map, can have 2^31 elements and more.
    """
    row = (plane[2] + places[0] * plane[4]).to(tl.int64)
    column = (plane[3] + places[1] * plane[5]).to(tl.int64)
    map_offset = plane[0].to(tl.int64) * strides[0] + plane[1].to(tl.int64) * strides[1]
    return ptr + map_offset + row * strides[2] + column * strides[3]


@triton.jit
def load_members(ptr, places, plane, inside, strides, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] vectors of members; zero where not `inside` and beyond channel DIM."""
    return load_rows(member_pointers(ptr, places, plane, strides), inside, strides[4], DIM, BLOCK_D)


@triton.jit
def store_members(ptr, values, places, plane, inside, strides, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [BLOCK, BLOCK_D] `values` of members, where `inside` and up to channel DIM."""
    store_rows(member_pointers(ptr, places, plane, strides), values, inside, strides[4], DIM, BLOCK_D)


@triton.jit
def whole_plane(image, head):
    """The plane of a map that is not dilated; for `member_pointers`."""
    return image, head, 0, 0, 1, 1


@triton.jit
def window_holds(query, key, members, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Whether queries see keys; both are pairs (rows, columns) of members that broadcast against each other."""
    start_y = window_start(query[0], members[0], KERNEL[0], STRIDE[0])
    start_x = window_start(query[1], members[1], KERNEL[1], STRIDE[1])
    seen_y = (key[0] >= start_y) & (key[0] < start_y + KERNEL[0])
    return seen_y & (key[1] >= start_x) & (key[1] < start_x + KERNEL[1])


@triton.jit
def down(places):
    """Places of a tile as rows of a score matrix, [TILE, 1] each."""
    return places[0][:, None], places[1][:, None]


@triton.jit
def across(places):
    """Places of a block as columns of a score matrix, [1, BLOCK] each."""
    return places[0][None, :], places[1][None, :]


@triton.jit
def reach_of_queries(first, members, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """First and end, both (rows, columns), of the union of the windows of the tile of queries at `first`."""
    last_y = tl.minimum(first[0] + TILE[0], members[0]) - 1
    last_x = tl.minimum(first[1] + TILE[1], members[1]) - 1
    start_y = window_start(first[0], members[0], KERNEL[0], STRIDE[0])
    start_x = window_start(first[1], members[1], KERNEL[1], STRIDE[1])
    end_y = window_start(last_y, members[0], KERNEL[0], STRIDE[0]) + KERNEL[0]
    end_x = window_start(last_x, members[1], KERNEL[1], STRIDE[1]) + KERNEL[1]
    return (start_y, start_x), (end_y, end_x)


@triton.jit
def reach_of_keys(first, members, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """First and end, both (rows, columns), of the queries whose window holds a key of the tile at `first`."""
    start_y = first_query(first[0] - KERNEL[0] + 1, members[0], KERNEL[0], STRIDE[0])
    start_x = first_query(first[1] - KERNEL[1] + 1, members[1], KERNEL[1], STRIDE[1])
    end_y = first_query(first[0] + TILE[0], members[0], KERNEL[0], STRIDE[0])
    end_x = first_query(first[1] + TILE[1], members[1], KERNEL[1], STRIDE[1])
    return (start_y, start_x), (end_y, end_x)


@triton.jit
def block_count(start, end, BLOCK: tl.constexpr):
    """Blocks that cover the members from `start` to `end`, and how many of them make a row of blocks."""
    columns = tl.cdiv(end[1] - start[1], BLOCK[1])
    return tl.cdiv(end[0] - start[0], BLOCK[0]) * columns, columns


@triton.jit
def block_corner(block, columns, start, BLOCK: tl.constexpr):
    """First member (row, column) of a block."""
    return start[0] + block // columns * BLOCK[0], start[1] + block % columns * BLOCK[1]
