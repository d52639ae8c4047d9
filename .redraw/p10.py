# ==================================================================================================
# 10. Command line, and the one place where exceptions become exit codes
# ==================================================================================================

EXIT_CODES: Final = """\
exit codes: 0 fine; 1 something needs attention, or the command could not do it; 2 usage or config
error; 75 another instance holds the state file; 130 interrupted"""

# Each command: what does it, whose docstring is its help, and an example of its arguments.
COMMANDS: Final[Mapping[str, tuple[Callable[[argparse.Namespace], int], str]]] = {
    "init": (run_init, "/srv/teckochecker"),
    "check": (run_check, "--config config.yaml"),
    "doctor": (run_doctor, "--config /etc/teckochecker/config.yaml"),
    "encrypt": (run_encrypt, "--rotate"),
    "secret": (
        run_secret,
        "set keboola-prod --type keboola --stack-url https://connection.keboola.com",
    ),
    "job": (run_job, "add nightly --batch-id batch_abc123 --config-id 123456"),
    "status": (run_status, "nightly-embeddings"),
    "logs": (run_logs, "nightly-embeddings -n 20 --follow"),
    "retry": (run_retry, "nightly-embeddings --force"),
    "import": (run_import, "old/teckochecker.db > imported.yaml"),
    "schema": (run_schema, "> schema.sql"),
}


def add_options(parsers: Mapping[str, argparse.ArgumentParser], style: Mapping[str, Any]) -> None:
    """Add each command's own options; `style` is for the parsers of actions."""
    parsers["init"].add_argument("directory", nargs="?", metavar="DIR", default=".")
    parsers["import"].add_argument("old", metavar="OLD.db", help="the old program's database")
    rotate = "encrypt under the first key what is already"
    parsers["encrypt"].add_argument("--rotate", action="store_true", help=rotate)
    status, logs, retry = (parsers[name].add_argument for name in ("status", "logs", "retry"))
    for add in (status, logs):
        add("job", nargs="?", metavar="JOB", help="only this run, or the runs of this job")
        add("--json", action="store_true", help="print JSON, for programs")
    status("--check", action="store_true", help="exit 1 if anything needs attention")
    status("--alive", action="store_true", help="exit 1 if no daemon runs, or polls are overdue")
    logs("-n", type=int, metavar="N", default=100, help="the last N lines (default: 100)")
    logs("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    retry("job", metavar="JOB", help="the name of a run, or of a job")
    force = "decide an unknown start, start what the policy refused, or repeat a success"
    retry("--force", action="store_true", help=force)
    for command, names in (("secret", "list set remove"), ("job", "add pause resume remove")):
        actions = parsers[command].add_subparsers(dest="action", metavar="ACTION", required=True)
        for action in names.split():
            parser = actions.add_parser(
                action, help=f"{action} {command}{'s' if action == 'list' else ''}", **style
            )
            if action != "list":
                parser.add_argument("name", metavar="NAME")
            if action == "set":
                for option in ("--type", "--stack-url", "--base-url"):
                    parser.add_argument(option, metavar="TEXT")
            elif action == "add":
                add_job_options(parser)


def new_parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    shared = argparse.ArgumentParser(add_help=False)
    text = "the config file (default: $TECKOCHECKER_CONFIG, then config.yaml)"
    shared.add_argument("--config", metavar="PATH", default=argparse.SUPPRESS, help=text)
    style: dict[str, Any] = {
        "parents": [shared],
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }

    def told(run: Callable[[argparse.Namespace], int], example: str) -> dict[str, Any]:
        parts = [textwrap.fill(" ".join(p.split()), 88) for p in str(run.__doc__).split("\n\n")]
        if run is run_logs:
            parts.append(textwrap.fill(f"events: {', '.join(EVENTS)}", 88))
        epilog = f"example: teckochecker {example}\n\n{EXIT_CODES}"
        return {"description": "\n\n".join(parts), "epilog": epilog}

    example = "--config /etc/teckochecker/config.yaml"
    parser = argparse.ArgumentParser("teckochecker", **told(run_daemon, example), **style)
    parser.set_defaults(run=run_daemon)
    parser.add_argument("--version", action="version", version=f"teckochecker {__version__}")
    once = "make one pass over every unfinished run, start what is ready, and exit (for cron)"
    parser.add_argument("--once", action="store_true", help=once)
    commands, parsers = parser.add_subparsers(title="commands", metavar="COMMAND"), {}
    for name, (run, arguments) in COMMANDS.items():
        line = str(run.__doc__).splitlines()[0].rstrip(".")
        about = told(run, f"{name} {arguments}")
        parsers[name] = commands.add_parser(name, help=line[0].lower() + line[1:], **about, **style)
        parsers[name].set_defaults(run=run)
    add_options(parsers, style)
    return parser


def open_standard_files() -> None:
    """Have 0, 1 and 2 open: else the state file could get one of them, and the log into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper):  # what it cannot show is no crash
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, and tells what is raised for a person."""
    open_standard_files()
    parser = new_parser()
    args = parser.parse_args(argv)
    if args.once and args.run is not run_daemon:
        parser.error("--once goes without a command")
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        code, text = 0, ""
    except TeckoError as error:  # a ConfigError's lines begin with their places
        who = "" if isinstance(error, ConfigError) else "teckochecker: "
        code, text = error.exit_code, f"{who}{error}"
    except sqlite3.Error as error:
        code, text = 1, f"teckochecker: cannot use the state file: {error}; {STATE_HINT}"
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        what = f"{error.strerror or error}{where}"
        code, text = 1, f"teckochecker: cannot go on: {what}; see to that first"
    else:
        return code
    with contextlib.suppress(OSError):
        print(text, end="\n" if text else "", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # at its end, the interpreter would try again to write what cannot arrive
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
