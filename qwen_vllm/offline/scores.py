"""Scores answers against reference texts, Chinese or English; knows nothing of models or files."""

from collections import Counter

from rapidfuzz.distance import Indel
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh


class Scores:
    """Scores over many pairs of answer and reference, of which only sums are kept.

    Words are sacreBLEU's `zh` tokens: each Chinese character is one, other text is split at spaces and punctuation.
    """

    def __init__(self) -> None:
        self._words, self._bleu = TokenizerZh(), BLEU(tokenize="zh", effective_order=True)
        self._pairs = self._exact = 0
        self._rouge_l = 0.0
        self._counts = [[0, 0] for _ in range(self._bleu.max_ngram_order)]
        self._lengths: Counter[str] = Counter()
        self._longest = 0  # words of the longest pair, by the shorter of its two

    def add(self, answer: str, reference: str) -> None:
        """Count one pair in."""
        answer, reference = answer.strip(), reference.strip()
        self._pairs += 1
        self._exact += answer == reference
        # 2 · longest common subsequence / sum of lengths: the F1 of ROUGE-L.
        self._rouge_l += Indel.normalized_similarity(self._words(answer).split(), self._words(reference).split())
        pair = self._bleu.sentence_score(answer, [reference])
        for sums, *found in zip(self._counts, pair.counts, pair.totals, strict=True):
            sums[:] = [a + b for a, b in zip(sums, found, strict=True)]
        self._lengths.update(answer=pair.sys_len, reference=pair.ref_len)
        self._longest = max(self._longest, min(pair.sys_len, pair.ref_len))

    def summary(self) -> dict[str, float]:
        """Return the number of pairs, the means of exact matches and ROUGE-L (0 to 1), and corpus BLEU (0 to 100).

        BLEU counts sequences of four words: it is left out where no pair has so many.
        """
        if not self._pairs:
            return {"pairs": 0}
        means = {
            "pairs": self._pairs,
            "exact_match": round(self._exact / self._pairs, 4),
            "rouge_l": round(self._rouge_l / self._pairs, 4),
        }
        if self._longest < self._bleu.max_ngram_order:
            return means
        correct, total = (list(column) for column in zip(*self._counts, strict=True))
        lengths = self._lengths["answer"], self._lengths["reference"]
        bleu = BLEU.compute_bleu(correct, total, *lengths, smooth_method="exp")
        return {**means, "bleu": round(bleu.score, 2)}
