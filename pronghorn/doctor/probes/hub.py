"""Ask the hub's front page for its headers and print the status."""

from __future__ import annotations

import json

_TIMEOUT_S = 3.0


def main() -> None:
    from huggingface_hub import get_session
    from huggingface_hub.constants import ENDPOINT

    response = get_session().head(ENDPOINT, timeout=_TIMEOUT_S, follow_redirects=True)
    print(json.dumps({"endpoint": ENDPOINT, "status": response.status_code}))


if __name__ == "__main__":
    main()
