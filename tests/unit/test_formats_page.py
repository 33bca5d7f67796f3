"""docs/formats.md is what the formats say."""

from pathlib import Path

from tersor.formats import FORMATS, page

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def test_the_committed_page_is_fresh(capsys):
    assert page.main(["--check", str(DOCS)]) == 0
    assert page.main([]) == 0
    assert capsys.readouterr().out == DOCS.read_text(encoding="utf-8")


def test_every_format_is_listed_with_its_bits():
    text = page.page()
    for name, f in FORMATS.items():
        assert f"| `{name}` | {f.bits_per_weight():.7g} |" in text


def test_a_stale_or_missing_page_is_told(tmp_path, capsys):
    stale = tmp_path / "formats.md"
    assert page.main(["--check", str(stale)]) == 1
    stale.write_text(page.page() + "\n", encoding="utf-8")
    assert page.main(["--check", str(stale)]) == 1
    assert "is stale; run: python -m tersor.formats.page" in capsys.readouterr().err


def test_other_arguments_show_the_usage(capsys):
    assert page.main(["--chekc"]) == 2
    assert "usage:" in capsys.readouterr().err
