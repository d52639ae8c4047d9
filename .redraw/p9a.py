# ==================================================================================================
# 9. Commands: what a person types. Only these print
# ==================================================================================================


def config_path(args: argparse.Namespace) -> Path:
    """Return the config that a command is about."""
    given_path = getattr(args, "config", None)
    return Path(given_path or os.environ.get("TECKOCHECKER_CONFIG") or "config.yaml")


# --- the daemon and --once ------------------------------------------------------------------------


async def was_cut_short(work: Awaitable[None], by: asyncio.Event) -> bool:
    """Do something for at most PATIENCE_S, unless an event is or becomes set; returns if it was."""
    doing, waiting = asyncio.ensure_future(work), asyncio.ensure_future(by.wait())
    try:
        if not by.is_set():
            await asyncio.wait(
                {doing, waiting}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED
            )
    finally:
        for task in (doing, waiting):
            task.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)
    return by.is_set()


def load_at_start(
    path: Path, files: Files, redactor: Redactor, *, once: bool
) -> tuple[LoadedConfig, ConfigError | None]:
    """Return the config to run with, and what is wrong with the file, if it is not that one.

    A daemon whose file was broken by the last edit goes on with the last good one of that path, as
    the state file has it. Raises ConfigError where there is none.
    """
    try:
        return load_config(path, files, os.environ, redactor), None
    except ConfigError as error:
        state_path = read_config_file(path, files)[0].state_path
        text = None
        if not once:
            with contextlib.suppress(TeckoError), Store.reading(state_path) as store:
                good = (store and store.meta("good_config")) or {}
                text = good.get("text") if good.get("path") == str(path.absolute()) else None
        if text is None:
            raise
        return load_config(path, files, os.environ, redactor, text), error


async def serve(path: Path, *, once: bool) -> int:
    """Be the daemon or, with `once`, one pass of it; returns the exit code.

    Raises ConfigError, LockedError and StateError before anything was asked of a server.
    """
    asyncio.get_running_loop().set_default_executor(DaemonThreads())
    redactor, files, env, writer = Redactor(), Files(), os.environ, LogWriter()
    loaded, rejected = load_at_start(path, files, redactor, once=once)
    config, clock, manager = loaded.config, Clock(), ServiceManager(env)
    configure = functools.partial(configure_logging, redactor=redactor, writer=writer)
    configure(config)
    lock = StateLock(config.state_path, "--once" if once else "daemon", clock.now())
    store = Store.open(config.state_path)
    http = Http(config, redactor)
    engine = Engine(loaded, store, lock, http, clock, redactor, once=once)
    webhooks = Http(replace(config, max_concurrency=10, request_timeout=10), redactor)
    publisher, signals = Publisher(engine), Signals()
    helpers: list[Callable[[], Awaitable[None]]] = []
    if not once:
        reloader = Reloader(engine, files, env, redactor, manager, configure)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.on_hangup)
        alive = functools.partial(keep_alive, engine, manager)
        tell = functools.partial(send_webhooks, engine, webhooks)
        helpers = [alive, reloader.run, reloader.watch, publisher.run, tell]
    try:
        note_start(engine, rejected)
        code = await run_engine(engine, signals, helpers, manager)
        if once and code == 0:
            code = end_of_pass(engine)
            telling = send_webhooks(engine, webhooks, once=True)
            code = 130 if await was_cut_short(telling, signals.stop) else code
        elif not once:
            engine.log(Event.of("daemon_stopped"))
        await was_cut_short(publisher.publish(is_running=False), signals.now)
    finally:
        await http.close()
        await webhooks.close()
        store.close()
        lock.close()
        writer.close()
    return code


def note_start(engine: Engine, rejected: ConfigError | None) -> None:
    """Tell what runs, and with which config."""
    config = engine.loaded.config
    if not engine.once:
        batches = sum(len(job.batch_ids) for job in config.jobs.values())
        facts = {"jobs": counted(len(config.jobs), "job"), "batches": counted(batches, "batch")}
        about = {"version": __version__, "pid": os.getpid(), "config": str(config.path)}
        engine.log(Event.of("daemon_started", **about, **facts))
    if rejected:
        problems = [str(problem) for problem in rejected.problems]
        event = Event.of("config_rejected", problem=problems[0], problems=problems)
        engine.note_config("\n".join(problems), event)
    else:
        note_loaded(engine, None)


def end_of_pass(engine: Engine) -> int:
    """Tell what still needs attention, when that is new and then once a day; returns the exit code."""
    engine.sweep()
    runs = [run for run in engine.shown() if run.attention]
    keys = [name for name, use in engine.stats.items() if use.refused_since]
    names = [run.name for run in runs] + keys
    told = engine.store.meta("attention_told") or {}
    now = engine.clock.now()
    if names and (told.get("names") != names or not 0 <= now - told.get("at", 0) < DAY_S):
        reasons = [f"{run.name} ({run.error or run.attention})" for run in runs]
        facts = {"count": len(names), "runs": "; ".join([*reasons, *keys]), "names": names}
        remember = Store.meta_statement("attention_told", {"names": names, "at": now})
        engine.commit([], [Event.of("jobs_need_attention", **facts)], [remember])
    return 1 if names or engine.has_failed else 0


def run_daemon(args: argparse.Namespace) -> int:
    """Run the daemon, or one pass with --once."""
    try:
        return asyncio.run(serve(config_path(args), once=args.once))
    except LockedError:
        # From cron, a pass that takes long is no reason for mail: it does the work.
        owner = lock_owner(read_config_file(config_path(args), Files())[0].state_path)
        if args.once and owner["once"]:
            return LockedError.exit_code
        raise


# --- what commands share --------------------------------------------------------------------------

RED: Final = "\033[31m"
GREEN: Final = "\033[32m"
DIM: Final = "\033[2m"


def can_show(text: str) -> bool:
    """Return whether standard output's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def painted(text: str, colour: str) -> str:
    """Return text in a colour, on a terminal whose owner wants colours (https://no-color.org)."""
    is_dumb = os.environ.get("TERM") == "dumb"
    is_wanted = sys.stdout.isatty() and not is_dumb and not os.environ.get("NO_COLOR")
    return f"{colour}{text}\033[0m" if colour and text and is_wanted else text


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def fitted(text: str, width: int) -> str:
    """Return a line, cut to a number of columns."""
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


# --- check, init ----------------------------------------------------------------------------------


def run_check(args: argparse.Namespace) -> int:
    """Validate the config just as the start does, without asking any server."""
    path = config_path(args)
    loaded = load_config(path, Files(), os.environ, Redactor())
    for warning in loaded.warnings:
        print(f"{path}: warning: {warning}", file=sys.stderr)
    jobs = loaded.config.jobs.values()
    batches = sum(len(job.batch_ids) for job in jobs)
    counts = ((len(jobs), "job"), (batches, "batch"), (len(loaded.secrets), "secret"))
    print(f"{path}: fine: {', '.join(counted(n, noun) for n, noun in counts)}")
    return 0


EXAMPLE_CONFIG: Final = """\
@@EXAMPLE@@"""


def write_new(path: Path, text: str) -> bool:
    """Write a file that only its owner can read; returns False if there is one already."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose another DIR") from None
    with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(text)
        file.flush()
        os.fsync(fd)
    return True


def run_init(args: argparse.Namespace) -> int:
    """Write a first config and a new key; the one that is there stays as it is."""
    directory = Path(args.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "choose another DIR"
        raise UsageError(f"cannot make {directory}: {error.strerror}", hint) from None
    config, key = directory / "config.yaml", directory / "teckochecker.key"
    made = [p for p, text in ((key, f"{Fernet.generate_key().decode()}\n"), (config, EXAMPLE_CONFIG)) if write_new(p, text)]
    if not made:
        raise UsageError(f"{config} and {key} are there already", "nothing is overwritten")
    shown = shlex.quote(str(config))
    print(f"wrote {' and '.join(map(str, sorted(made)))}, which only you can read. Next:")
    print(f"  1. edit {config}: stack, batch ids, config_id, and the tokens, in plain for now")
    print(f"  2. teckochecker --config {shown} encrypt")
    print(f"  3. teckochecker --config {shown} doctor, then without a command: the daemon")
    return 0


