"""Everything that crosses a process boundary, one declared type each.

Who says what to whom, all DEALER to ROUTER:

    engine    -> queue      Hello, Chunks, EngineStats            <- Welcome, Ack, Refused
    actor     -> queue      Hello, OpenGroup, AppendTokens, Close... <- Welcome, Ack, Admit, Appended, Resume, Park ...
    learner   -> queue      Hello, LeaseRequest, Applied ...      <- Welcome, Lease, Done
    publisher -> queue      Hello, VersionReport, StockReport ...  <- Welcome
    observer  -> queue      Hello, StatusRequest, Shutdown        <- Welcome, Status, StepRecord
    learner   -> publisher  VersionOffer, UpdatePart, LearnerDone  <- VersionWanted, VersionTaken
    engine    -> publisher  EngineHello, Alive, PartTaken, Live   <- UpdatePart, CommitOrder, HashOrder

Any of them may be killed and started again.  What must not be lost is sent until it is answered: sequenced messages
(engines' chunks, what actors say of trajectories) until an `Ack` covers them, requests until their reply comes.  Who is
told `Refused(reason="not_registered")` says `Hello` again: the other side has restarted.
"""

from stream_rl.messages.learning import Applied, Committed, LearnerDone, Lease, LeaseRequest
from stream_rl.messages.observing import DrainEngine, Shutdown, Status, StatusRequest, StepRecord
from stream_rl.messages.peers import Alive, Done, Hello, Refused, Welcome
from stream_rl.messages.trajectories import (
    Ack,
    ActorStats,
    Admit,
    Appended,
    AppendTokens,
    Cancel,
    Chunks,
    CloseTrajectory,
    Drain,
    Engines,
    EngineStats,
    Evaluated,
    Interrupted,
    OpenBranch,
    OpenGroup,
    Park,
    Resume,
)
from stream_rl.messages.weights import (
    CommitOrder,
    EngineHello,
    EngineVerified,
    HashOrder,
    HashReport,
    Live,
    PartTaken,
    StockReport,
    UpdatePart,
    VersionOffer,
    VersionReport,
    VersionTaken,
    VersionWanted,
)

__all__ = [
    "Ack",
    "ActorStats",
    "Admit",
    "Alive",
    "AppendTokens",
    "Appended",
    "Applied",
    "Cancel",
    "Chunks",
    "CloseTrajectory",
    "CommitOrder",
    "Committed",
    "Done",
    "Drain",
    "DrainEngine",
    "EngineHello",
    "EngineStats",
    "EngineVerified",
    "Engines",
    "Evaluated",
    "HashOrder",
    "HashReport",
    "Hello",
    "Interrupted",
    "LearnerDone",
    "Lease",
    "LeaseRequest",
    "Live",
    "OpenBranch",
    "OpenGroup",
    "Park",
    "PartTaken",
    "Refused",
    "Resume",
    "Shutdown",
    "Status",
    "StatusRequest",
    "StepRecord",
    "StockReport",
    "UpdatePart",
    "VersionOffer",
    "VersionReport",
    "VersionTaken",
    "VersionWanted",
    "Welcome",
]
