"""What the erasure budget looks like in a terminal."""

from rich.console import Console

from bwsk_fx.report.erasure import ErasureBudget, LayerErasure, NodeErasure


def _node(layer, erased=6.0, operands=18):
    return NodeErasure(f"{layer}_down", "Linear", f"{layer}.down", erased, None, operands)


def _block(index, so_far, **changes):
    return LayerErasure(f"layers.{index}", (_node(f"layers.{index}", **changes),), 0, so_far, 0)


def _rows(budget, title):
    """The cells of one of the two tables, split at wide gaps."""
    lines = str(budget).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(title))
    lines = lines[next(index for index in range(start, len(lines)) if lines[index].startswith("─")) + 1 :]
    return [line.split() for line in lines[: lines.index("") if "" in lines else None]]


def test_each_block_has_a_row_and_equal_ones_share_their_nodes():
    budget = ErasureBudget((_block(0, 6), _block(1, 12), _block(2, 21, erased=9.0)))
    assert _rows(budget, "erased per sample") == [
        ["layers.0", "1", "6", "0", "6", "0"],
        ["layers.1", "1", "6", "0", "12", "0"],
        ["layers.2", "1", "9", "0", "21", "0"],
    ]
    assert _rows(budget, "what erases it") == [
        ["layers.0-1", "down", "6", "33.3%"],
        ["layers.2", "down", "9", "50.0%"],
    ]


def test_only_consecutive_blocks_share():
    budget = ErasureBudget((_block(0, 6), _block(1, 12), _block(0, 18), _block(1, 24)))
    assert [row[0] for row in _rows(budget, "what erases it")] == ["layers.0-1", "layers.0-1"]


def test_gray_and_unmeasured_have_columns_where_there_are_any():
    unmeasured = NodeErasure("sign", "sign")
    budget = ErasureBudget((_block(0, 6), LayerErasure("", (unmeasured,), 2, 6, 0)))
    assert _rows(budget, "erased per sample")[1] == ["(top", "level)", "1", "2", "1", "0", "0", "6", "0"]
    assert _rows(budget, "what erases it")[1] == ["(top", "level)", "sign", "unknown"]
    assert "GRAY" not in str(ErasureBudget((_block(0, 6),)))
    assert "unmeasured" not in str(ErasureBudget((_block(0, 6),)))


def test_a_leaf_module_outside_of_blocks_goes_by_its_operator():
    head = LayerErasure("head", (NodeErasure("head", "Linear", "head", 5.0, None, 8),), 0, 5, 0)
    assert _rows(ErasureBudget((head,)), "what erases it") == [["head", "Linear", "5", "62.5%"]]


def test_a_share_is_a_part_of_the_whole():
    assert _node("layers.0", erased=20.0, operands=18).share is None
    assert _node("layers.0", operands=None).share is None
    assert NodeErasure("act", "GELU", erased_bits=4.0, operand_elements=4).share is None


def test_vit_base_fits_a_small_terminal():
    attention = NodeErasure("sdpa", "scaled_dot_product_attention", "", 302592.0, None, 453888)
    activation = NodeErasure("act", "GELU", "", None, 605184.0, 605184)
    layers = [LayerErasure(f"vit.layers.{index}", (attention, activation), 0, 9e6, 7e6) for index in (10, 11)]
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        console.print(ErasureBudget(tuple(layers)))
    assert "vit.layers.10-11  scaled_dot_product_attention   302,592        66.7%" in captured.get()


def test_nothing_to_show():
    budget = ErasureBudget(())
    assert (budget.erased_elements, budget.erased_bits, budget.unmeasured) == (0, 0, 0)
    assert _rows(budget, "erased per sample") == []
