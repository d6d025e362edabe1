"""skorch: the examples that its FewShotClassifier draws in `fit`: one of each label first, then at random.

They are the same for every query. It shows them in the order in which they were drawn, and the other way round where
there are more of them than labels, so that those of the first round stand next to the query. No language model is
loaded: what `fit` does beside drawing is left out.
"""

from importlib.metadata import version

import numpy as np
from lookup import Chosen, Job, run
from skorch.llm import FewShotClassifier


def choose(job: Job) -> Chosen:
    classifier = FewShotClassifier("none", max_samples=job.shots, random_state=job.seed)
    classifier.classes_ = np.unique(job.labels)
    shown = classifier.get_examples(job.texts, job.labels, n_samples=job.shots)
    turned = len(classifier.classes_) < job.shots
    row_of = {pair: row for row, pair in enumerate(zip(job.texts, job.labels, strict=True))}
    rows = [row_of[pair] for pair in (shown[::-1] if turned else shown)]
    return Chosen([rows] * len(job.queries), "best-last" if turned else "best-first", version("skorch"))


if __name__ == "__main__":
    run(choose=choose)
