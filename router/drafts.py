"""What lossless decoding did: tokens drafted by the gated model, and how many of them the dense model let stand."""

from dataclasses import dataclass


@dataclass
class Drafts:
    """Counts of the lossless generations made while `running(drafts=...)` had it.

    Attributes:
        drafted: tokens that the gated model has drafted for the dense one to verify.
        accepted: those of them that are in the answer because the dense model would have made them, too.
        verifications: passes of the dense model, each over one more token than was drafted; the prompt's is none.
    """

    drafted: int = 0
    accepted: int = 0
    verifications: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted, 0 to 1; 0 where none was drafted.

        Example:
            >>> Drafts(drafted=8, accepted=6, verifications=2).acceptance
            0.75
        """
        return self.accepted / max(1, self.drafted)

    @property
    def accepted_length(self) -> float:
        """Tokens of the answer for each pass of the dense model, which adds one of its own: at least 1.

        Example:
            >>> Drafts(drafted=8, accepted=6, verifications=2).accepted_length
            4.0
        """
        return 1 + self.accepted / max(1, self.verifications)

    def __str__(self) -> str:
        return (
            f"{self.accepted} of {self.drafted} drafted tokens accepted in {self.verifications} passes of the dense "
            f"model: {self.accepted_length:.1f} tokens a pass"
        )
