"""How the engine reads: a hidden state passes ten files, none import each other, tensors have shapes."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import skipit.router

FOLDER = Path(skipit.router.__file__).parent
# What a hidden state passes, from the layer it enters; `Call.policy` is a policy, though no import says so.
WAY = ("layer", "policies")
# The same way once more, of a layer as one graph, made or recorded; without `skipit.compile` nobody passes it.
GRAPHS = {"compiled", "recorded"}
# What stands beside that way. A reader of these lines need not open the files.
BESIDE = {
    "config": "names of the choices that a call carries; no tensor",
    "errors": "classes of errors; no tensor",
    "strict_json": "how settings are read; no tensor",
    "modality": "`MODALITIES`, the names of the two; tokens are told apart before any layer",
    "subclass": "how a class is put before another; no tensor",
    "measured": "from when on one of two ways to run a layer is the faster one here; no tensor",
    "views": "how a layer's own code runs with another part inside; which part, is said on the way",
    "spending": "the threshold of each row at which its prompt spends a budget; `policies` compares with it",
    "costs": "FLOPs of the layers, read off their modules; no tensor",
    "room": "where there is memory for more keys and values than are held; which these are, `cache` says",
    "eviction": "the derivative for gates that learn under `evict`; its values are those of the mask",
}
ENGINE = (
    *("attention", "cache", "call", "compiled", "eviction", "execute", "gates", "generation"),
    *(
        "layer",
        "layout",
        "lossless",
        "modality",
        "policies",
        "recorded",
        "room",
        "running",
        "spending",
        "stand_ins",
        "stretch",
        "views",
    ),
)


def imports(name: str) -> set[str]:
    """The files of the router that one of them imports, under `TYPE_CHECKING` too."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    return {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_one_hidden_state_is_followed_through_a_gated_layer_in_ten_files() -> None:
    reached: set[str] = set()
    to_read = set(WAY)
    while to_read:
        reached |= to_read
        to_read = {other for name in to_read for other in imports(name)} - reached - set(BESIDE) - GRAPHS
    assert {other for name in GRAPHS for other in imports(name)} <= reached | set(BESIDE) | GRAPHS
    assert reached == {
        "layer",
        "call",
        "stretch",
        "gates",
        "policies",
        "execute",
        "stand_ins",
        "attention",
        "cache",
        "layout",
    }
    assert len(reached) <= 10
    documented = str(skipit.router.__doc__)
    assert all(f"`{name}.py`" in documented for name in reached | set(BESIDE) - {"config", "errors", "strict_json"})


def test_what_stands_beside_leads_nowhere_else() -> None:
    for name in BESIDE:
        assert imports(name) <= set(BESIDE), name
    for name in ("config", "errors", "strict_json", "subclass"):
        assert "Tensor" not in (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def test_no_files_import_each_other() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    list(TopologicalSorter({name: imports(name) for name in names}).static_order())  # CycleError


def bare_tensors(node: ast.AST) -> list[ast.AST]:
    """The places in an annotation where a tensor has no shape."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Float", "Int", "Bool", "Shaped"):
        return []
    if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).rpartition(".")[-1] == "Tensor":
        return [node]
    return [bare for child in ast.iter_child_nodes(node) for bare in bare_tensors(child)]


def annotations(tree: ast.AST) -> list[ast.AST]:
    """What annotates parameters, returns and attributes, public or not."""
    places: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            places += [node.returns, *(argument.annotation for argument in every if argument is not None)]
        elif isinstance(node, ast.ClassDef):
            places += [line.annotation for line in node.body if isinstance(line, ast.AnnAssign)]
    return [place for place in places if place is not None]


@pytest.mark.parametrize("name", ENGINE)
def test_every_tensor_in_a_signature_has_a_shape(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    assert [f"line {bare.lineno}" for place in annotations(tree) for bare in bare_tensors(place)] == []  # type: ignore[attr-defined]


def test_a_tensor_without_a_shape_is_seen() -> None:
    tree = ast.parse(
        "def f(x: list[torch.Tensor], *y: Float[Tensor, 'a'] | Tensor) -> tuple[Tensor, int]: ...\n"
        "class C:\n    z: Tensor | None = None\n    w: Int[Tensor, ' a']\n"
    )
    assert len([bare for place in annotations(tree) for bare in bare_tensors(place)]) == 4
