"""Scores against values worked out by hand, or by sacreBLEU over the whole corpus."""

import pytest
from sacrebleu.metrics import BLEU

from qwen_vllm.offline.scores import Scores

CHINESE = [("今天天气很好，我们去公园。", "今天天气不错，我们去公园玩。"), ("北京", "北京")]
ENGLISH = [("The cat sat on the mat.", "A cat sat on the mat."), ("Paris", "Paris "), ("", "Rome")]


def scored(pairs):
    scores = Scores()
    for answer, reference in pairs:
        scores.add(answer, reference)
    return scores.summary()


def test_nothing_to_score():
    assert scored([]) == {"pairs": 0}


@pytest.mark.parametrize("pairs", [CHINESE, ENGLISH, CHINESE + ENGLISH])
def test_bleu_is_that_of_the_whole_corpus(pairs):
    answers, references = zip(*pairs, strict=True)
    corpus = BLEU(tokenize="zh").corpus_score(answers, [references])
    assert scored(pairs)["bleu"] == round(corpus.score, 2)


@pytest.mark.parametrize(
    "pairs",
    [[("北京", "北京"), ("是的。", "是的。")], [("B", "B")], [("Paris is the capital.", "Paris")], [("", "A b c d")]],
)
def test_short_pairs_have_no_bleu(pairs):
    assert [*scored(pairs)] == ["pairs", "exact_match", "rouge_l"]
    assert scored([*pairs, ("one two three four", "one two three four")])["bleu"] > 0


def test_rouge_l_counts_chinese_characters_and_english_words():
    # 11 of 13 and 14 characters are common, in order.
    assert scored(CHINESE[:1])["rouge_l"] == pytest.approx(2 * 11 / (13 + 14), abs=1e-4)
    # 6 of 7 and 7 words, the full stop is one.
    assert scored(ENGLISH[:1])["rouge_l"] == pytest.approx(2 * 6 / (7 + 7), abs=1e-4)


def test_exact_match_leaves_space_around_out():
    assert scored(ENGLISH)["exact_match"] == pytest.approx(1 / 3, abs=1e-4)
    assert scored(CHINESE + ENGLISH)["pairs"] == 5
