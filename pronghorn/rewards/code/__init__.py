"""Untrusted code as a reward: run in a sandbox of Linux namespaces with limits on everything, or not at all."""

from .cases import CaseResult as CaseResult
from .errors import SandboxError as SandboxError
from .limits import Limits as Limits
from .probe import require_sandbox as require_sandbox
from .reward import code_execution_reward as code_execution_reward
from .run import run_code as run_code
from .sandbox import CodeResult as CodeResult
