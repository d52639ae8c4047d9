# ==================================================================================================
# 9. Commands: what a person types. Only these print
# ==================================================================================================


def config_path(args: argparse.Namespace) -> Path:
    """Return the config that a command is about."""
    given_path = getattr(args, "config", None)
    return Path(given_path or os.environ.get("TECKOCHECKER_CONFIG") or "config.yaml")


# --- the daemon and --once ------------------------------------------------------------------------


async def at_most(seconds: float, work: Awaitable[object], hurry: asyncio.Event) -> None:
    """Do something for so long at most, or until an event is set."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hurry.wait())]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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
        good = None
        state_path = read_config_file(path, files)[0].state_path
        with contextlib.suppress(TeckoError), Store.reading(state_path) as store:
            good = store and store.meta("good_config")
        if once or not good or good["path"] != str(path.absolute()):
            raise
        return load_config(path, files, os.environ, redactor, good["text"]), error


async def serve(path: Path, *, once: bool) -> int:
    """Be the daemon or, with `once`, one pass of it; returns the exit code.

    Raises ConfigError, LockedError and StateError before anything was asked of a server.
    """
    loop, redactor, files, writer = asyncio.get_running_loop(), Redactor(), Files(), LogWriter()
    loop.set_default_executor(DaemonThreads())
    loaded, rejected = load_at_start(path, files, redactor, once=once)
    config, clock, manager = loaded.config, Clock(), ServiceManager(os.environ)
    configure = functools.partial(configure_logging, redactor=redactor, writer=writer)
    configure(config)
    lock = StateLock(config.state_path, "--once" if once else "daemon", clock.now())
    store = Store.open(config.state_path)
    http = Http(config, redactor)
    webhooks = Http(replace(config, max_concurrency=10, request_timeout=10), redactor)
    engine, signals = Engine(loaded, store, lock, http, clock, redactor, once=once), Signals()
    helpers: list[Callable[[], Awaitable[None]]] = []
    if not once:
        reloader = Reloader(engine, files, manager, redactor, configure)
        loop.add_signal_handler(signal.SIGHUP, reloader.on_hangup)
        alive = functools.partial(keep_alive, engine, manager)
        tell = functools.partial(send_webhooks, engine, webhooks)
        show = functools.partial(keep_published, engine)
        helpers = [alive, reloader.run, reloader.watch, show, tell]
    try:
        note_start(engine, rejected)
        code = await run_engine(engine, signals, helpers, manager)
        if once and code == 0:
            code = end_of_pass(engine)
            telling = send_webhooks(engine, webhooks, once=True)
            await at_most(PATIENCE_S, telling, signals.stop)
            code = 130 if signals.stop.is_set() else code
        elif not once:
            engine.log(Event.of("daemon_stopped"))
        await at_most(PATIENCE_S, publish(engine, is_running=False), signals.now)
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
        batches = counted(sum(len(job.batch_ids) for job in config.jobs.values()), "batch")
        facts = {"jobs": counted(len(config.jobs), "job"), "batches": batches}
        facts |= {"version": __version__, "pid": str(os.getpid()), "config": str(config.path)}
        engine.log(Event.of("daemon_started", None, **facts))
    if rejected is None:
        return note_loaded(engine, None)
    problems = str(rejected).splitlines()
    event = Event.of("config_rejected", problem=problems[0], problems=problems)
    return engine.note_config("\n".join(problems), event)


def end_of_pass(engine: Engine) -> int:
    """Tell what needs attention, when that is new and then once a day; returns the exit code."""
    engine.sweep()
    needs = {r.name: r.error or r.attention for r in engine.shown() if r.attention}
    needs |= {name: use.error or "" for name, use in engine.stats.items() if use.refused_since}
    names, now = list(needs), engine.clock.now()
    told = engine.store.meta("attention_told") or {}
    if needs and (told.get("names") != names or not 0 <= now - told["at"] < DAY_S):
        runs = "; ".join(f"{name} ({why})" for name, why in needs.items())
        event = Event.of("jobs_need_attention", count=len(names), runs=runs, names=names)
        remember = Store.meta_statement("attention_told", {"names": names, "at": now})
        engine.commit([], [event], [remember])
    return 1 if needs or engine.has_failed else 0


def run_daemon(args: argparse.Namespace) -> int:
    """Start a Keboola job, once, when OpenAI has finished a team's batches.

    Without a command: run as the daemon, in the foreground, until SIGTERM; the config is read again
    whenever it changes, and on SIGHUP.
    """
    return asyncio.run(serve(config_path(args), once=args.once))


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
    cells = [[text.ljust(n) for text, n in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


# --- check, init ----------------------------------------------------------------------------------


def run_check(args: argparse.Namespace) -> int:
    """Validate the config offline, just as the start does.

    YAML, every key, the Fernet key and every secret. Each problem is one line with its place and
    its cure. No server is asked.
    """
    path = config_path(args)
    loaded = load_config(path, Files(), os.environ, Redactor())
    for warning in loaded.warnings:
        print(f"{path}: warning: {warning}", file=sys.stderr)
    jobs = loaded.config.jobs.values()
    batches = counted(sum(len(job.batch_ids) for job in jobs), "batch")
    counts = f"{counted(len(jobs), 'job')}, {batches}, {counted(len(loaded.secrets), 'secret')}"
    print(f"{path}: fine: {counts}")
    return 0


EXAMPLE_CONFIG: Final = """\
@@EXAMPLE@@"""


def run_init(args: argparse.Namespace) -> int:
    """Write a commented config.yaml and a new key file.

    Both only for your eyes (mode 0600). What is there already is never overwritten.
    """
    directory, made = Path(args.directory), []
    config, key = directory / "config.yaml", directory / "teckochecker.key"
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in ((config, EXAMPLE_CONFIG), (key, f"{Fernet.generate_key().decode()}\n")):
        with contextlib.suppress(FileExistsError):
            opener = functools.partial(os.open, mode=0o600)
            with open(path, "x", encoding="utf-8", opener=opener) as file:
                made.append(path)
                file.write(text)
    if not made:
        raise UsageError(f"{config} and {key} are there already", "nothing is overwritten")
    command = f"teckochecker --config {shlex.quote(str(config))}"
    print(f"wrote {' and '.join(map(str, made))}, which only you can read. Next:")
    print(f"  1. edit {config}: stack, batch ids, config_id, and the tokens, in plain for now")
    print(f"  2. {command} encrypt")
    print(f"  3. {command} doctor, then without a command: the daemon")
    return 0
