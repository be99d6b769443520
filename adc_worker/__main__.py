"""Where every command starts."""

import signal


def main() -> None:
    """Run the command line; the console scripts point here. Ctrl-C while it is imported ends it without a traceback."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background it may be ignored
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from adc_worker.cli.main import main as run  # noqa: PLC0415 (takes a good part of a second)

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
