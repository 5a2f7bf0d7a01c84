"""``mergekit-snrf``: mergekit's own merge command with the plugin installed by hand."""

from __future__ import annotations


def main() -> None:
    """Run ``mergekit-yaml`` where torch's autoload is switched off (TORCH_DEVICE_BACKEND_AUTOLOAD=0)."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from mergekit_snrf.merge import install

    install()
    mergekit_yaml(prog_name="mergekit-snrf")


if __name__ == "__main__":
    main()
