"""Words of the report follow its numbers: every verdict is turned both ways by changing what was measured."""

import math
import re
from typing import Any

import pytest

from skipit.eval.report import claims, controlled, inputs, peers, tracking, transfer
from skipit.eval.report.cost import cost, saving
from skipit.eval.report.maps import heat_maps
from skipit.eval.report.part import Missing, Part, number, p_value, plural, points
from skipit.eval.statistics import paired_difference

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipit.eval.report.page.as_svg", lambda figure: b"<svg/>")


def said(part: Part | Missing | None) -> str:
    """The verdict of a part, without markup."""
    assert isinstance(part, Part)
    return re.sub(r"<[^>]+>", "", " ".join(part.verdict)).replace("&#x27;", "'")


def body(part: Part | Missing | None) -> str:
    assert isinstance(part, Part)
    return re.sub(r"<[^>]+>", " ", " ".join(part.body)).replace("&#x27;", "'")


def estimate(value: float, low: float, high: float, p: float, p_shift: float | None = 0.04) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "p": p, "p_shift": p_shift, "reason": ""}


FOLLOWS = estimate(-0.8, -0.9, -0.5, 0.001)
SHIFTED = estimate(-0.8, -0.9, -0.5, 0.001, 0.4)
OPPOSITE = estimate(0.8, 0.5, 0.9, 0.001)
UNCLEAR = estimate(-0.3, -0.7, 0.2, 0.2)
WIDE = estimate(-0.4, -0.8, 0.1, 0.01)


class TestCost:
    @pytest.mark.parametrize(
        ("lost", "gained", "words"),
        [
            (0, 0, "no difference that these rows can show (p = 1.000); a loss of more than"),
            (12, 1, "it costs accuracy (p = 0.003)"),
            (1, 12, "it is more accurate (p = 0.003), which fine-tuning can do and skipping cannot"),
        ],
    )
    def test_accuracy(self, values: dict[str, Any], lost: int, gained: int, words: str) -> None:
        first = [True] * lost + [False] * gained + [True] * 87
        second = [False] * lost + [True] * gained + [True] * 87
        values["gated"]["difference"]["all"] = paired_difference(first, second).to_json()
        assert words in said(cost(values))

    def test_kinds_that_lose(self, values: dict[str, Any]) -> None:
        kinds = values["gated"]["difference"]["kinds"]
        for kind in kinds:
            kinds[kind] = paired_difference([True], [True]).to_json()
        assert "a loss is shown" not in said(cost(values))
        kinds["row"] = paired_difference([True] * 40, [True] * 39 + [False]).to_json()
        assert kinds["row"]["p"] == 1
        assert "a loss is shown" not in said(cost(values)), "one row is noise"
        kinds["row"] = paired_difference([True] * 40, [True] * 34 + [False] * 6).to_json()
        assert 0.05 / len(kinds) < kinds["row"]["p"] < 0.05
        assert "a loss is shown" not in said(cost(values)), "the worst of several is that bad by chance"
        kinds["row"] = paired_difference([True] * 40, [True] * 20 + [False] * 20).to_json()
        told = "Of 6 kinds of question, a loss is shown on row (\N{MINUS SIGN}50.0 points, p = &lt;0.001)."
        assert told in said(cost(values))

    def test_what_it_is_compared_with(self, values: dict[str, Any]) -> None:
        assert "the model without gates in" in said(cost(values))
        values["settings"]["dense"] = "untouched"
        assert "the model untouched in" not in said(cost(values))
        assert "the untouched model in" in said(cost(values))

    @pytest.mark.parametrize(
        ("verdict", "words"),
        [
            ("worse", "It is worse calibrated: "),
            ("better", "It is better calibrated: "),
            ("no difference shown", "No change of its calibration is shown: "),
        ],
    )
    def test_calibration(self, values: dict[str, Any], verdict: str, words: str) -> None:
        values["calibration"] |= {"verdict": verdict, "by_chance": [-0.001, 0.02]}
        assert "would differ by \N{MINUS SIGN}0.001 to +0.020." in said(cost(values))
        assert words in said(cost(values))
        values.pop("calibration")
        assert "calibrat" not in said(cost(values))

    def test_further_routers(self, values: dict[str, Any]) -> None:
        assert "neutral &lt;script&gt;" in body(cost(values))
        values["also"] = []
        assert "Further routers" not in body(cost(values))


class TestSaving:
    @pytest.mark.parametrize(
        ("prefill", "decode", "words"),
        [
            ((1.2, 1.6), (0.9, 1.1), "Prefill takes 10.00 ms instead of 15.00: faster (1.50x [1.20, 1.60])"),
            ((0.5, 0.8), (0.9, 1.1), "slower (1.50x [0.50, 0.80])"),
            ((0.9, 1.2), (0.9, 1.1), "no difference in time shown"),
            (None, None, "too few repeats to tell (1.50x)"),
        ],
    )
    def test_time(self, values: dict[str, Any], prefill: Any, decode: Any, words: str) -> None:
        values["dense"]["latency"]["prefill_ms"] = 15.0
        values["gated"]["latency"] |= {
            "prefill_ms": 10.0,
            "prefill_speed_up": 1.5,
            "prefill_interval": prefill,
            "decode_interval": decode,
        }
        assert words in said(saving(values))

    def test_the_compiled_model_is_the_other_baseline(self, values: dict[str, Any]) -> None:
        values["dense"]["compiled"] = None
        assert "It was not compiled; compiled it may be faster." in body(saving(values))
        values["dense"]["compiled"] = "RuntimeError: no C++ compiler"
        assert "It was not compiled: RuntimeError: no C++ compiler;" in body(saving(values))
        for latency, ups in ((values["gated"]["latency"], (1.5, 1.2)), (values["dense"]["latency"], (1.0, 1.0))):
            latency |= {"prefill_speed_up": ups[0], "decode_speed_up": ups[1]}
        fast = {**values["dense"]["latency"], "prefill_ms": 5.0, "decode_ms": 2.0}
        values["dense"]["compiled"] = {**fast, "prefill_speed_up": 2.0, "decode_speed_up": 2.0}
        assert "takes 5.00 ms and 2.00 ms: against that it is 0.75x and 0.60x." in said(saving(values))
        assert "It was not compiled" not in body(saving(values))

    def test_flops_are_not_milliseconds(self, values: dict[str, Any]) -> None:
        gated = values["gated"]["latency"]
        values["gated"]["compute"] = 0.5
        gated["prefill_interval"] = gated["decode_interval"] = (0.5, 0.9)
        assert "what gates and packing cost is more than what skipping saves" in said(saving(values))
        gated["prefill_interval"] = gated["decode_interval"] = (0.9, 1.1)
        assert "do not show as milliseconds here" in said(saving(values))
        gated["prefill_interval"] = (1.1, 1.2)
        assert "milliseconds" not in said(saving(values))


class TestTracking:
    @pytest.mark.parametrize(
        ("known", "layers", "word"),
        [
            ([FOLLOWS], 12, "yes"),
            ([FOLLOWS, FOLLOWS], 12, "yes"),
            ([SHIFTED], 12, "not shown beyond what a shifted profile gives"),
            ([SHIFTED], 6, "not shown beyond what a shifted profile gives"),
            ([{**FOLLOWS, "p_shift": 1 / 12}], 6, "yes, as far as 6 layers can tell"),
            ([OPPOSITE], 12, "no, the opposite"),
            ([UNCLEAR], 12, "not shown"),
            ([WIDE], 12, "not shown"),
            ([FOLLOWS, UNCLEAR, OPPOSITE], 12, "mixed: yes in 1 of 3 routers"),
        ],
    )
    def test_words(self, known: list[dict[str, Any]], layers: int, word: str) -> None:
        assert tracking.judge(known, layers)[0] == word

    def given(self, values: dict[str, Any], depth: dict[str, Any], modality: dict[str, Any]) -> str:
        values["also"] = []
        table = values["gated"]["tracking"]["tables"]["geometric"]["all"]
        table["spearman"] = FOLLOWS
        table["given"] |= {"depth_curve": depth, "depth_modality": modality}
        return said(tracking.tracking(values))

    def test_confounders_take_an_agreement_back(self, values: dict[str, Any]) -> None:
        assert "High redundancy: yes. Spearman" in self.given(values, FOLLOWS, FOLLOWS)
        told = self.given(values, FOLLOWS, UNCLEAR)
        assert "High redundancy: yes, but no more than depth and modality explain. Spearman" in told
        assert "Given depth, also U-shaped: it stays" in told
        assert "High redundancy: yes, but no more than depth explains. " in self.given(values, WIDE, FOLLOWS)

    def test_how_gates_began(self, values: dict[str, Any]) -> None:
        told = said(tracking.tracking(values))
        assert "Does this checkpoint follow the theory? Its gates began as the theory's" in told
        assert "Does neutral &lt;script&gt; (2 routers) follow the theory? Its gates began neutral" in told

    def test_no_variation_is_no_correlation(self, values: dict[str, Any]) -> None:
        nothing = {**estimate(0, 0, 0, 0), **dict.fromkeys(("value", "low", "high", "p", "p_shift"), None)}
        nothing["reason"] = "`skip_rate` is 0 for all 24 units"
        values["also"] = []
        for scopes in values["gated"]["tracking"]["tables"].values():
            for found in scopes.values():
                found |= {"spearman": nothing, "given": dict.fromkeys(found["given"], nothing), "overlap": nothing}
        told = tracking.tracking(values)
        assert "cannot be said (`skip_rate` is 0 for all 24 units)" in said(told)
        assert "No correlation can be computed" in body(told)

    def test_several_routers_are_mean_and_spread(self, values: dict[str, Any]) -> None:
        first, second = values["also"][:2]
        first["tracking"]["tables"]["damage"]["all"]["spearman"] = {**FOLLOWS, "value": -0.8}
        second["tracking"]["tables"]["damage"]["all"]["spearman"] = {**SHIFTED, "value": -0.6}
        told = body(tracking.tracking(values))
        assert "\N{MINUS SIGN}0.70 ± 0.14" in told
        assert "0.040 to 0.400" in told


def test_where_it_skips(values: dict[str, Any]) -> None:
    values["gated"]["skip_rate"] = [[0.0, 1.0], [0.0, 0.6], [0.0, None]] + [[0.0, 0.0]] * 9
    values["also"] = []
    told = said(heat_maps(values))
    assert "Vision tokens skip 15% of the layers, by more than half of them in layers 0, 1." in told
    assert "Text tokens skip 0% of the layers, in no layer by more than half of them." in told


class TestRivals:
    def test_words(self, values: dict[str, Any]) -> None:
        ours, bi, random = values["baselines"]["entries"]
        alike = "Something simpler is not shown to be worse: "
        assert f"{alike}&lt;b&gt;random&lt;/b&gt;" in said(peers.peers(values)), "it has one run"
        random["spread"] = 0.02
        assert "No, it is above all of 2 baselines (each with p &lt; 0.05)" in said(peers.peers(values))
        random["accuracy"] = ours["accuracy"] - 0.02
        assert f"{alike}&lt;b&gt;random&lt;/b&gt;" in said(peers.peers(values)), "a deviation of each is noise"
        bi |= {"accuracy": ours["accuracy"] + 0.025}
        assert peers.p_difference(ours, bi) < 0.05
        assert f"{alike}bi" in said(peers.peers(values)), "one of two is that much better by chance"
        bi |= {"accuracy": 1.2}
        assert "Yes, something simpler did better: bi (120.0% at 49.0%)" in said(peers.peers(values))
        bi["compute"] = random["compute"] = 0.53
        assert "Nothing to compare with at this budget" in said(peers.peers(values))

    def test_what_a_method_cannot_do(self, values: dict[str, Any]) -> None:
        _, bi, random = values["baselines"]["entries"]
        bi |= {"runs": 0, "floor": 0.7}
        random |= {"runs": 0, "failed": 1}
        told = body(peers.peers(values))
        assert "cannot: spends 70.0% at least" in told
        assert "training failed" in told

    def test_controls_of_ours_are_no_peers(self, values: dict[str, Any]) -> None:
        control = {**values["baselines"]["entries"][0], "system": "ours-retain: permuted over tokens", "accuracy": 2.0}
        values["baselines"]["entries"].append(control)
        found = peers.peers(values)
        assert "ours-retain: permuted" not in said(found)
        assert "Controls, which are the same router with its decisions moved: permuted over tokens (200.0%" in body(
            found
        )

    def test_without_ours(self, values: dict[str, Any]) -> None:
        values["baselines"]["entries"].pop(0)
        told = said(peers.peers(values))
        assert "cannot be said" in told


class TestControlled:
    @pytest.mark.parametrize(
        ("low", "high", "words"),
        [
            (0.3, 0.9, "predicts the order"),
            (-0.9, -0.3, "predicts the reverse of the order"),
            (-0.1, 0.9, "is not shown"),
        ],
    )
    def test_prediction(self, values: dict[str, Any], low: float, high: float, words: str) -> None:
        values["units"]["correlation"]["all"] |= {"low": low, "high": high}
        assert f"The theory's damage {words}" in said(controlled.controlled(values))

    def growing(self, values: dict[str, Any], best: float, worst: float, checkpoint: float, of: int = 500) -> str:
        values["gated"] |= {"compute": 0.5, "accuracy": checkpoint, "rows": of}
        values["growing"]["rows"] = 100
        for name, right in ((controlled.BEST, best), (controlled.WORST, worst)):
            for point in values["growing"]["curves"][name]:
                point["accuracy"] = {"value": right, "low": right, "high": right}
        return said(controlled.controlled(values))

    def test_order(self, values: dict[str, Any]) -> None:
        assert "is better than the reverse order: 90.0 [" in self.growing(values, 0.9, 0.5, 0.99)
        assert "is worse than the reverse order" in self.growing(values, 0.5, 0.9, 0.99)
        assert "is not shown to be better than the reverse order" in self.growing(values, 0.9, 0.88, 0.99)

    @pytest.mark.parametrize(("forced", "generated", "trusted"), [(0.0, 1.0, False), (0.9, 1.0, True)])
    def test_completions_that_the_model_does_not_write(
        self, values: dict[str, Any], forced: float, generated: float, trusted: bool
    ) -> None:
        values["units"] |= {"dense_accuracy": forced, "generated_accuracy": generated, "rows": 48}
        for part in (controlled.controlled(values), claims.quadrants(values)):
            told = "Do not trust this part: without skipping, 0.0% of its 48 rows are right teacher-forced, but 100.0%"
            assert (told in said(part)) != trusted
            assert said(part).startswith("Do not trust") != trusted

    def test_a_router_that_is_not_needed(self, values: dict[str, Any]) -> None:
        assert "The checkpoint is above both" in self.growing(values, 0.9, 0.5, 0.99)
        assert "is not clearly above this, which needs no router" in self.growing(values, 0.9, 0.5, 0.92)
        assert "is not clearly above this" in self.growing(values, 0.9, 0.5, 0.99, of=10), "ten rows prove little"


@pytest.mark.parametrize("verdict", ["found", "not found", "undecided"])
def test_quadrants(values: dict[str, Any], verdict: str) -> None:
    for found in values["quadrants"].values():
        found["verdict"] = {"accuracy": verdict, "kl": "undecided"}
        found["conditions"]["redundancy"]["kl"] = verdict
    told = said(claims.quadrants(values))
    assert f"redundant and little looked at is {verdict} by accuracy and undecided by divergence" in told
    assert f"that redundancy protects is {verdict}," in told
    assert told.count("With ") == 2


@pytest.mark.parametrize(
    ("verdict", "words"),
    [("found", "found in what was learned (3 [2, 4] of 12 layers)"), ("not found", "not found in what was learned")],
)
def test_pattern(values: dict[str, Any], verdict: str, words: str) -> None:
    found = values["pattern"]
    found["learned"]["late entry"], found["theory"]["late entry"] = verdict, "not found"
    found["learned_entry"] = {"length": {"value": 3.0, "low": 2.0, "high": 4.0}, "p": 0.01}
    assert f"Late entry of vision tokens: {words}, not found in the theory's tables" in said(claims.pattern(values))


def test_parts_that_a_model_does_not_allow(values: dict[str, Any]) -> None:
    values.pop("quadrants")
    assert isinstance(found := claims.quadrants(values), Missing)
    assert "it needs rows with images and a model of enough layers" in found.how
    values["settings"]["controlled_samples"] = 0
    assert isinstance(found := claims.quadrants(values), Missing)
    assert "--controlled-samples 48" in found.how


class TestInputs:
    @pytest.mark.parametrize(
        ("value", "p", "words"),
        [
            (0.3, 0.01, "It spends more on harder rows (rank"),
            (-0.3, 0.01, "It spends less on harder rows (rank"),
            (0.3, 0.2, "More compute for hard rows is not shown (rank"),
            (0.3, 0.04, "More compute for hard rows is not shown (rank"),  # one of two is below 0.05 by chance
        ],
    )
    def test_difficulty(self, values: dict[str, Any], value: float, p: float, words: str) -> None:
        for found in values["adaptivity"]["difficulty"].values():
            found |= {"value": value, "p": p, "low": value - 0.1, "high": value + 0.1}
        assert words in said(inputs.adaptivity(values))

    def test_measures_that_disagree(self, values: dict[str, Any]) -> None:
        first, second = values["adaptivity"]["difficulty"].values()
        first |= {"value": 0.5, "p": 0.001, "low": 0.2, "high": 0.8}
        second |= {"value": -0.5, "p": 0.001, "low": -0.8, "high": -0.2}
        assert "Mixed: more on rows that are hard by one measure" in said(inputs.adaptivity(values))

    def test_groups_must_be_clearer_the_more_there_are(self, values: dict[str, Any]) -> None:
        contrast = {"rows": 5, "share": 0.5, "rest": 0.4, "low": 0.01, "high": 0.03, "effect": 0.5, "control": 0.0}
        levels = {name: {**contrast, "difference": 0.0, "p": 1.0} for name in "abcd"}
        levels["a"] |= {"difference": 0.02, "p": 0.03}
        values["adaptivity"] |= {"groups": {"question": levels}, "tokens": {}}
        assert "None of 4 groups of rows or kinds of token" in said(inputs.adaptivity(values))
        levels["a"]["p"] = 0.001
        told = said(inputs.adaptivity(values))
        assert "Clearest differences between groups, of 4 looked at: question: a +2.00 [+1.00, +3.00] points" in told

    def test_no_depth_map_says_why(self, values: dict[str, Any]) -> None:
        found = inputs.depth_maps({**values, "examples": [], "no_examples": "it is not known where patches lie."}, [])
        assert isinstance(found, Missing)
        assert found.how == "it is not known where patches lie."

    def test_wrong_answers_are_called_wrong(self, values: dict[str, Any]) -> None:
        from PIL import Image

        example = {**values["examples"][0], "right": False, "wanted": "<7>", "prompt": "$x$ <i>?"}
        told = body(inputs.depth_maps({**values, "examples": [example]}, [Image.new("L", (8, 8))]))
        assert "the answer is wrong, expected &lt;7&gt;" in told
        assert "$x$ &lt;i&gt;?" in told


class TestTransfer:
    def test_means_alone_say_nothing(self, values: dict[str, Any]) -> None:
        told = said(transfer.transfer(values))
        assert "(row): cannot be said: the folder holds means alone" in told
        assert "trained on all: cannot be said" in told

    def test_rows_decide_where_they_are_known(self, values: dict[str, Any]) -> None:
        found = values["transfer"]["figures"]["types"]["row"]["trained on cell"]
        found["difference"] = paired_difference([True] * 20, [True] * 19 + [False]).to_json()
        told = said(transfer.transfer(values))
        assert "(row): no loss against the untouched model is shown." in told
        found["difference"] = paired_difference([True] * 20, [True] * 10 + [False] * 10).to_json()
        assert "(row): it loses accuracy: \N{MINUS SIGN}50.0 [" in said(transfer.transfer(values))

    def test_too_little(self, values: dict[str, Any]) -> None:
        values["transfer"]["figures"] = {"types": {}, "shifts": {}}
        assert "holds too little to say anything" in said(transfer.transfer(values))


def test_numbers() -> None:
    assert points(None) == number(math.nan) == p_value(None) == "\N{EN DASH}"
    assert number(-1e-9, "+.1f") == "0.0"
    assert points(-0.0123) == "\N{MINUS SIGN}1.2"
    assert p_value(0.0) == "<0.001"
    assert plural(1000, "row") == "1,000 rows"
