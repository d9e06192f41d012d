import re

import pytest
from huggingface_hub import ModelCard

from bwsk_fx.training import card


@pytest.fixture(scope="module")
def loaded(six_variants) -> ModelCard:
    return ModelCard.load(six_variants.output / "README.md")


def test_the_hub_reads_the_test_accuracy_of_every_variant(loaded, six_variants):
    assert loaded.data.model_name == "bwsk-vit-tiny-digits"
    assert loaded.data.library_name == "transformers"
    values = {result.metric_name: result.metric_value for result in loaded.data.eval_results}
    assert values == {
        f"Accuracy ({folder})": round(result["test_metric"], 6) for folder, result in six_variants.results.items()
    }
    assert {result.dataset_name for result in loaded.data.eval_results} == {"scikit-learn digits"}


def test_the_table_has_a_row_per_variant(loaded, six_variants):
    lines = loaded.text.splitlines()
    heading = lines.index("| " + " | ".join(card.HEADINGS) + " |")
    rows = [line.strip("| ").split(" | ") for line in lines[heading + 2 : heading + 8]]
    assert [row[0] for row in rows] == list(six_variants.results)
    assert {len(row) for row in rows} == {len(card.HEADINGS)}
    assert rows[0][-2:] == ["-", "-"]
    assert lines[heading + 8] == ""


def test_augmentation_and_options_of_the_trainer_are_stated(loaded, six_variants):
    (plain,) = (line for line in loaded.text.splitlines() if line.startswith("AdamW, "))
    assert plain.endswith("best weights restored. Made with torch")
    configuration = {"augment": True, "trainer": {"optim": "sgd", "adam_beta1": 0.5}}
    results = {
        folder: result | {"configuration": result["configuration"] | configuration}
        for folder, result in six_variants.results.items()
    }
    (line,) = (line for line in card.render(results).splitlines() if line.startswith("sgd, "))
    assert "restored. Training images cropped and mirrored at random. Further" in line
    assert '`{"adam_beta1": 0.5, "optim": "sgd"}`. Made with' in line


def test_limits_are_stated(loaded):
    assert "## Limitations" in loaded.text
    assert "one image is 0.28 points" in loaded.text
    assert "{{" not in loaded.text


def test_a_row_is_formatted_for_people():
    result = {
        "test_metric": 0.98765,
        "best_val_metric": 0.5,
        "final_train_loss": 0.12345,
        "epochs_completed": 3.0,
        "wall_time_s": 12.34,
        "step_time_s": 0.0123,
        "saved_for_backward_bytes": 3 * 2**19,
        "peak_memory_mb": 2.345,
        "parallelism_ratio": 98 / 136,
        "erasure_budget": 38 / 136,
        "sound_s_ratio": 0.0,
        "sound_k_ratio": 0.0,
    }
    assert card.rows({"x": result}) == [
        ("x", "98.77%", "50.00%", "0.1235", "3", "12.3", "12.3", "1.50", "2.35", "72.1/27.9", "-")
    ]


def test_every_picture_of_the_card_is_there(loaded, six_variants):
    shown = re.findall(r"!\[.*?\]\((.*?)\)", loaded.text)
    assert shown == ["loss.png", "accuracy.png", "memory.png", "timeline.png"]
    assert all((six_variants.output / name).is_file() for name in shown)
