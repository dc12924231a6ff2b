"""Answers whose lengths are new in every round.

Rounds of one length pay for it once, in the round that warms up: libraries plan, kernels compile
and steps are captured for sizes that they have not seen. Users ask about other pictures each time.
"""

from nanoglimpse.benchmark.contenders import Ours
from nanoglimpse.benchmark.models import Workload
from nanoglimpse.errors import UsageError

STAGES = ("first token", "a token", "end to end")


class NewLengths:
    """Dense answers to a prompt that grows from round to round, each given twice.

    The picture grows by a column and the question by the length of an answer, so that no step of
    decoding has a length that an earlier round had. The second answer has the same lengths as the
    first one, and their quotient is the price of a new length.
    """

    name = "dense, new lengths"

    def __init__(self, workload: Workload):
        self.workload, self.visits = workload, 0

    def fits(self, rounds: int) -> bool:
        """Whether the context of the model takes the prompts of so many rounds."""
        self.visits = rounds + 1
        try:
            longest = self.next()
            lengths = [len(prompt) for prompt in longest.prompts]
            self.workload.engine.model.check_context(lengths, self.workload.args.new)
        except UsageError:
            return False
        finally:
            self.visits = 0
        return True

    def next(self) -> Workload:
        """The workload of the present visit."""
        return self.workload.longer(self.visits, self.visits * self.workload.args.new)

    def round(self) -> dict[str, float]:
        """Milliseconds of the first answer by stage; those of the second end with ", again"."""
        self.visits += 1
        answers = Ours(self.next(), "dense")
        first, again = (answers.answer()[1] for _ in range(2))
        return {stage: first[stage] for stage in STAGES} | {
            f"{stage}, again": again[stage] for stage in STAGES
        }
