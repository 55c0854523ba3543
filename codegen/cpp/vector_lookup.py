"""Looking centroids up: what direct and buffered kernels of vector formats share."""

from __future__ import annotations

from lowbit.codegen.cpp.expr import Node, Printer, build, name
from lowbit.codegen.cpp.sides import indent
from lowbit.codegen.cpp.vector_plan import TILE, Book, Part, VectorPlan

__all__ = [
    "batch_pointers",
    "book_functions",
    "book_pointers",
    "centroid_terms",
    "first_tiles",
    "index_words",
    "sum_of",
]


def book_functions(plan: VectorPlan) -> str:
    """For each codebook `stored_<book>(operand, i)`: centroid i as stored, padded with zeros to whole vectors, and
    `gather_<book>(book, offset)`: the centroid so many bytes behind what `book_pointers` declares."""
    return "\n".join(_book(b) for b in plan.books)


def _book(book: Book) -> str:
    lanes = book.lanes
    lines = [f"LB_INLINE F{lanes} stored_{book.name}(const ST* p) {{"]
    if book.item_bytes == 1:
        lines += [
            f"float room[{lanes}];",
            f"for (int i = 0; i < {lanes}; ++i) room[i] = float(int8_t(p[i] - {book.zero}));",
            f"return load{lanes}(room);",
            "}",
        ]
    elif book.dim == lanes:
        lines += [f"return load{lanes}(p);", "}"]
    else:
        # Reading a whole vector could leave the codebook.
        lines += [
            f"ST room[{lanes}] = {{}};",
            f"memcpy(room, p, {book.dim} * sizeof(ST));",
            f"return load{lanes}(room);",
            "}",
        ]
    type_, read = ("float", f"load{lanes}") if book.wide else ("ST", f"stored_{book.name}")
    lines += [
        f"LB_INLINE F{lanes} gather_{book.name}(const {type_}* book, uint64_t offset) {{",
        f"return {read}((const {type_}*)((const uint8_t*)book + offset));",
        "}",
    ]
    return indent(lines)


def first_tiles(part: Part) -> str:
    """`first_<part>` and `tiles_<part>`: the first tile of each segment, and how many it has."""
    first = [sum(part.tiles[:i]) for i in range(len(part.tiles))]
    return "".join(
        f"static const int64_t {label}_{part.name}[] = {{{', '.join(map(str, values))}}};\n"
        for label, values in (("first", first), ("tiles", part.tiles))
    )


def book_pointers(part: Part, group: str) -> list[str]:
    """Declarations of `<book>`: the codebooks of `segment` and `group`."""
    out = []
    for book in part.books:
        source, type_, row = ("wide_", "float", book.lanes) if book.wide else ("", "ST", book.dim)
        at = f"(segment * {part.groups} + {group}) * {book.size * row}"
        out.append(f"const {type_}* {book.name} = a.{source}{book.name} + {at};")
    return out


def batch_pointers(part: Part, column: str) -> list[str]:
    """Declarations of `i_<index>`: the indices of the batch that starts at vector `v` of `segment`, at a column."""
    return [
        f"const {b.index_type}* i_{b.index} = a.{b.index} + "
        f"((first_{part.name}[segment] + v / {TILE}) * {part.columns} + {column}) * {TILE} + v % {TILE};"
        for b in part.books
    ]


def index_words(part: Part, many: int) -> list[str]:
    """Declarations of `w<n>_<index>`: the indices of `many` vectors of one column, in as few loads as there can be."""
    out = []
    for book in part.books:
        per = 64 // book.index_bits
        for word in range(-(-many // per)):
            count = min(per, many - word * per)
            out += [
                f"uint64_t w{word}_{book.index} = 0;",
                f"memcpy(&w{word}_{book.index}, i_{book.index} + {word * per}, {count * book.index_bits // 8});",
            ]
    return out


def centroid_terms(part: Part, v: int) -> list[str]:
    """The weights of vector `v` of a batch as terms of a sum, printed from the format's decode program."""
    names = ("index", "residual_index")
    args = {arg: name(_offset(book, v)) for arg, book in zip(names, part.books, strict=False)}
    return [Printer("words").text(term) for term in _terms(build(part.program, {**args, "lane": name("lane")}))]


def sum_of(terms: list[str]) -> str:
    """The terms, added."""
    return terms[0] if len(terms) == 1 else f"fadd({sum_of(terms[:-1])}, {terms[-1]})"


def _terms(node: Node) -> list[Node]:
    return [t for a in node.args for t in _terms(a)] if node.op == "fadd" else [node]


def _offset(book: Book, v: int) -> str:
    """Bytes from the start of the codebook to the centroid of vector `v` of a column."""
    word, slot = divmod(v, 64 // book.index_bits)
    shift = book.row_bytes.bit_length() - 1
    if book.row_bytes == 1 << shift:
        return f"index_at<{book.index_bits}, {slot}, {shift}>(w{word}_{book.index})"
    return f"index_at<{book.index_bits}, {slot}, 0>(w{word}_{book.index}) * {book.row_bytes}"
