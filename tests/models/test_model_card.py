"""The card of a saved model names who asks, and nobody who was removed."""

from tiny_models import aware_model, named_model


def card_of(model, folder):
    model.save_pretrained(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_who_was_removed_is_no_longer_on_the_card(tmp_path):
    model = named_model()
    assert "| queriers | Amy, Bernadette, Howard, 小雪, a/b |" in card_of(model, tmp_path)
    model.remove_queriers("Howard")
    card = card_of(model, tmp_path)
    assert "Howard" not in card and "| num_queriers | 4 |" in card
    (tmp_path / "README.md").write_text("mine: Howard", encoding="utf-8")
    assert card_of(model, tmp_path) == "mine: Howard"


def test_of_several_processes_one_writes_the_card(tmp_path):
    named_model().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_card_shows_names_as_they_are(tmp_path):
    model = aware_model(querier_names=["a|b", "c\nd", "`e`", "<f>", "g_h_"])
    assert r"| queriers | a\|b, c d, \`e\`, \<f\>, g\_h\_ |" in card_of(model, tmp_path)


def test_a_card_of_many_shows_a_few(tmp_path):
    many = [f"q{index}" for index in range(1000)]
    card = card_of(aware_model(num_queriers=1000, querier_names=many, expert_rank=1), tmp_path)
    assert "q18, q19 and 980 more |" in card and "q20" not in card
