# ==================================================================================================
# 10. Command line, and the one place where exceptions become exit codes
# ==================================================================================================

EXIT_CODES: Final = """\
exit codes: 0 fine; 1 something needs attention, or the command could not do it; 2 usage or config
error; 75 another instance holds the state file; 130 interrupted"""

# Each command: what does it, its help in a line, more of it, an example.
COMMANDS: Final[Mapping[str, tuple[Callable[[argparse.Namespace], int], str, str, str]]] = {
    "init": (
        run_init,
        "write a commented config.yaml and a new key file",
        "Both only for your eyes (mode 0600). What is there already is never overwritten.",
        "init /srv/teckochecker",
    ),
    "check": (
        run_check,
        "validate the config offline",
        "It goes the daemon's own way: YAML, every key, the Fernet key, every secret. Each\n"
        "problem is one line with its place and its cure. No server is asked.",
        "check --config config.yaml",
    ),
    "doctor": (
        run_doctor,
        "try everything that has to be right",
        "Config, key, permissions, disk, state file, clock, every OpenAI key and watched batch,\n"
        "every Keboola token, queue and configuration: a line each, with the cure. Nothing is\n"
        "started, nothing is changed; it works beside the daemon. Exits 1 if anything is wrong.",
        "doctor --config /etc/teckochecker/config.yaml",
    ),
    "encrypt": (
        run_encrypt,
        "encrypt every plain value under secrets, in place",
        "Comments and layout stay, and so do the file's mode and owner; the file is replaced as\n"
        "a whole. The key comes from $TECKOCHECKER_KEY, $CREDENTIALS_DIRECTORY/teckochecker.key\n"
        "or key_file (Fernet: AES-128-CBC with HMAC-SHA256); of several, the first encrypts.",
        "encrypt --rotate",
    ),
    "secret": (
        run_secret,
        "list, set or remove secrets in the config",
        "`list` shows names, types and users, never values. `set` asks for the value (hidden; over\n"
        "standard input otherwise), encrypts it, and makes the entry if it is missing.",
        "secret set keboola-prod --type keboola --stack-url https://connection.keboola.com",
    ),
    "job": (
        run_job,
        "add, pause, resume or remove jobs in the config",
        "The file is edited in place, as by a careful person; a running daemon takes it.",
        "job add nightly --batch-id batch_abc123 --config-id 123456",
    ),
    "status": (
        run_status,
        "show the runs, or one job with its whole story",
        "It reads the state file, whether the daemon runs or not, and says which. What needs\n"
        "attention comes first. BATCHES: finished/all, and how much of their requests is done.",
        "status nightly-embeddings",
    ),
    "logs": (
        run_logs,
        "show what has happened, of all jobs or of one",
        "It reads the events that the state file keeps, also while the daemon runs.\n\nevents:\n"
        + textwrap.fill(", ".join(EVENTS), 88),
        "logs nightly-embeddings -n 20 --follow",
    ),
    "retry": (
        run_retry,
        "try a run again now, or all unfinished ones of a job",
        "Polls, searches, or starts again what Keboola rejected or what failed there. A running\n"
        "daemon does it within two seconds, otherwise the next start or --once.",
        "retry nightly-embeddings --force",
    ),
    "import": (
        run_import,
        "print a config made of a database of TeckoChecker 0.9",
        "The old secrets are opened with $SECRET_KEY and encrypted with our key. Exits 1 if\n"
        "something is left out, or has to be looked at, which is told on standard error.",
        "import old/teckochecker.db > imported.yaml",
    ),
    "schema": (
        run_schema,
        "print the SQL of the state file",
        "For whoever wants to read it with other programs. It needs no config.",
        "schema",
    ),
}


def line_count(text: str) -> int:
    """Return a number of lines. Raises argparse.ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of lines")
    return int(text)


def add_options(parsers: Mapping[str, argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add each command's own options."""
    encrypt = parsers["encrypt"].add_mutually_exclusive_group().add_argument
    encrypt("--rotate", action="store_true", help="encrypt under the first key what is already")
    encrypt("--set", metavar="NAME", help="the same as `secret set NAME`")
    parsers["init"].add_argument("directory", nargs="?", metavar="DIR", default=".")
    parsers["import"].add_argument("old", metavar="OLD.db", help="the old program's database")
    status = parsers["status"].add_argument
    status("job", nargs="?", metavar="JOB", help="only this job or run, with its whole story")
    status("--json", action="store_true", help="print JSON, for programs")
    status("--check", action="store_true", help="exit 1 if anything needs attention")
    status("--alive", action="store_true", help="exit 1 if no daemon runs, or polls are overdue")
    logs = parsers["logs"].add_argument
    logs("job", nargs="?", metavar="JOB", help="only what concerns this job or run")
    logs("-n", type=line_count, metavar="N", default=100, help="the last N lines (default: 100)")
    logs("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    logs("--json", action="store_true", help="print a JSON object a line")
    retry = parsers["retry"].add_argument
    retry("job", metavar="JOB", help="the name of a run, or of a job")
    force = "decide an unknown start, start what the policy refused, or repeat a success"
    retry("--force", action="store_true", help=force)
    actions = parsers["secret"].add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", parents=[shared], help="names, types and users")
    setting = actions.add_parser("set", parents=[shared], help="ask for a value, and put it there")
    for option in ("--type", "--stack-url", "--base-url"):
        setting.add_argument(option, metavar="TEXT")
    removing = actions.add_parser("remove", parents=[shared], help="remove one that nobody uses")
    for parser in (setting, removing):
        parser.add_argument("name", metavar="NAME")
    actions = parsers["job"].add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in ("add", "pause", "resume", "remove"):
        parser = actions.add_parser(action, parents=[shared], help=f"{action} a job")
        parser.add_argument("name", metavar="NAME")
        if action == "add":
            add_job_options(parser)


def new_parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="the config file (default: $TECKOCHECKER_CONFIG, then config.yaml)",
    )
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="teckochecker",
        parents=[shared],
        **style,
        description="Start a Keboola job, once, when OpenAI has finished a team's batches.\n"
        "Without a command: run as the daemon, in the foreground, until SIGTERM; the config is\n"
        "read again whenever it changes, and on SIGHUP.",
        epilog=f"example: teckochecker --config /etc/teckochecker/config.yaml\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"teckochecker {__version__}")
    once = "make one pass over every unfinished run, start what is ready, and exit (for cron)"
    parser.add_argument("--once", action="store_true", help=once)
    parser.set_defaults(run=run_daemon)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parsers = {}
    for name, (run, text, more, example) in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name,
            parents=[shared],
            help=text,
            **style,
            description=f"{text[0].upper()}{text[1:]}.\n{more}",
            epilog=f"example: teckochecker {example}\n\n{EXIT_CODES}",
        )
        parsers[name].set_defaults(run=run)
    add_options(parsers, shared)
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
            nowhere = io.FileIO(os.open(os.devnull, os.O_WRONLY), "w")
            setattr(sys, name, io.TextIOWrapper(nowhere))
        elif isinstance(stream, io.TextIOWrapper):  # what it cannot show is no crash
            stream.reconfigure(errors="backslashreplace")


def exit_code(args: argparse.Namespace) -> int:
    """Run a command; what it raises for a person is told, and becomes its exit code."""
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except TeckoError as error:
        print(f"teckochecker: {error}", file=sys.stderr)
        return error.exit_code
    except sqlite3.Error as error:
        print(f"teckochecker: cannot use the state file: {error}; {STATE_HINT}", file=sys.stderr)
        return 1
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    open_standard_files()
    parser = new_parser()
    args = parser.parse_args(argv)
    if args.once and args.run is not run_daemon:
        parser.error("--once goes without a command")
    try:
        return exit_code(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "thread" not in str(error):
            raise
        # At its end, the interpreter would try once more to write what cannot arrive.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            return 0
        with contextlib.suppress(OSError):
            where = getattr(error, "filename", None)
            what = f"{getattr(error, 'strerror', None) or error}{f': {where}' if where else ''}"
            print(f"teckochecker: cannot go on: {what}; see to that first", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
