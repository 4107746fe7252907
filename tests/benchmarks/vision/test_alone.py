"""The notebook's check of a family holds, and fails where a mask is wrong."""

from benchmarks.vision import alone
from benchmarks.vision.stock import stock_outcome
from unsloth_puzzles.exchange import exchange_classes, original_class
from unsloth_puzzles.vision.mllama import patch_mllama


def test_pixtral_pays_for_images_that_share_a_sequence():
    found = alone.check_family("pixtral", "cpu")
    assert len(found.checks) == 10 and all(found.checks.values())
    assert found.difference <= alone.LARGEST and found.work == 1 < found.work_alone < 2 and found.unpatched is None


def test_mllama_is_measured_without_its_patch_first():
    found = alone.check_family("mllama", "cpu")
    assert all(found.checks.values()) and found.work == found.work_alone == 1
    assert found.difference <= alone.LARGEST and min(found.unpatched) > 100 * alone.LARGEST


def test_images_that_pad_a_row_fail_over_each_image_alone(monkeypatch):
    """As transformers has it, Mllama's tower works on padding images, in a batch without text rows as well."""

    def patch_all_but_the_tower(model):
        patch_mllama(model)
        tower = model.model.vision_model
        exchange_classes([(tower, original_class(type(tower)))])

    monkeypatch.setattr(alone, "patch_mllama", patch_all_but_the_tower)
    found = alone.check_family("mllama", "cpu")
    assert found.work == 1 and found.work_alone == 4 / 3
    assert [name for name, good in found.checks.items() if not good] == ["mllama, tower over each image alone"]


def test_a_dropped_attention_mask_fails(monkeypatch):
    class Broken(alone.VisionCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            return {**batch, "attention_mask": batch["attention_mask"] * 0 + 1}

    monkeypatch.setattr(alone, "VisionCollator", Broken)
    found = alone.check_family("llava", "cpu")
    assert [name for name, good in found.checks.items() if not good] == ["llava, padding on the left"]


def test_messages_of_others_are_not_cut_within_a_word(monkeypatch):
    from trl.trainer import sft_trainer

    def collator(_):
        raise ValueError("a word " * 50)

    monkeypatch.setattr(sft_trainer, "DataCollatorForVisionLanguageModeling", collator)
    for part in stock_outcome(None, []).split("; "):
        assert part.endswith(("word ...", " a ...")) and len(part) <= 140 + len("ValueError: ")
