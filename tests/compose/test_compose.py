"""docker-compose.yml, brought up for real from images that are built here: what the README promises of it.

The tests share one project. Those that take it down and up again stand last and leave it up, but for the very last one.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from compose_stack import CHECKOUT, INSIDE, Stack, run, running
from psycopg.rows import scalar_row

from connlab.runtime.process import wait_until

pytestmark = [pytest.mark.machine, pytest.mark.timeout(1200)]

NOTEBOOK = "notebooks/00_start_here.ipynb"
VOLUMES = ("postgres", "secrets", "work")
SERVERS = ("postgres", "pgbouncer")
GONE_WITHIN = 10.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The project, up and healthy. Its images are made first if they are missing or older than the checkout."""
    run(str(CHECKOUT / "deploy" / "build-offline-images"), "compose")
    with running(tmp_path_factory.mktemp("compose") / "course") as stack:
        yield stack


def login(stack: Stack, service: str, password: str, user: str = "app", database: str = "shop") -> str:
    """Where a program on this machine connects, with nothing from its environment or a file of passwords."""
    return (
        f"host=127.0.0.1 port={stack.ports[service]} user={user} dbname={database} password={password} "
        f"passfile=/dev/null connect_timeout=10"
    )


def status(stack: Stack, path: str, *, token: str = "", host: str = "127.0.0.1", method: str = "GET") -> int:
    """The status with which JupyterLab answers a request from this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["jupyter"], timeout=10)
    try:
        authorization = {"Authorization": f"token {token}"} if token else {}
        connection.request(method, path, headers={"Host": host, **authorization})
        return connection.getresponse().status
    finally:
        connection.close()


def other_addresses() -> list[str]:
    """This machine's IPv4 addresses besides the loopback's."""
    found = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    return [one.address for one in found if one.family == socket.AF_INET and not one.address.startswith("127.")]


def test_ports_are_published_on_this_machine_alone(stack: Stack) -> None:
    published = {
        (inside, binding["HostIp"], int(binding["HostPort"]))
        for container in stack.containers()
        for inside, bindings in container["NetworkSettings"]["Ports"].items()
        for binding in bindings or []
    }
    assert published == {(f"{INSIDE[name]}/tcp", "127.0.0.1", port) for name, port in stack.ports.items()}


def test_nobody_listens_on_the_machines_other_addresses(stack: Stack) -> None:
    assert other_addresses(), "this machine has no other address: the test says nothing"
    for address in other_addresses():
        for port in stack.ports.values():
            with socket.socket() as attempt:
                attempt.settimeout(2)
                assert attempt.connect_ex((address, port)) != 0, f"{address}:{port} answers"


@pytest.mark.parametrize("service", SERVERS)
def test_a_program_sees_the_shop(stack: Stack, service: str) -> None:
    with psycopg.connect(login(stack, service, stack.secret("app_password")), row_factory=scalar_row) as connection:
        assert connection.execute("select count(*) from users").fetchone() == 1000
        assert connection.execute("select current_user").fetchone() == "app"
        assert connection.execute("select rolsuper from pg_roles where rolname = current_user").fetchone() is False


def test_pgbouncer_pools_by_transaction_in_front_of_postgres(stack: Stack) -> None:
    password = stack.secret("app_password")
    # Two clients at once, and one server connection is enough for both.
    with (
        psycopg.connect(login(stack, "pgbouncer", password), autocommit=True, row_factory=scalar_row) as one,
        psycopg.connect(login(stack, "pgbouncer", password), autocommit=True, row_factory=scalar_row) as other,
    ):
        backends = {client.execute("select pg_backend_pid()").fetchone() for client in (one, other, one, other)}
    assert len(backends) == 1


def test_the_console_answers_the_role_app(stack: Stack) -> None:
    console = login(stack, "pgbouncer", stack.secret("app_password"), database="pgbouncer")
    with psycopg.connect(console, autocommit=True, prepare_threshold=None, cursor_factory=psycopg.ClientCursor) as conn:
        assert ("shop", "app") in {row[:2] for row in conn.execute("SHOW POOLS")}


def test_pgbouncer_takes_the_parameter_that_the_jdbc_driver_sends(stack: Stack) -> None:
    words = b"user\0app\0database\0shop\0extra_float_digits\x002\0\0"
    startup = struct.pack("!ii", 8 + len(words), 3 << 16) + words
    with socket.create_connection(("127.0.0.1", stack.ports["pgbouncer"]), timeout=10) as connection:
        connection.sendall(startup)
        assert connection.recv(1) == b"R", "PgBouncer asks for the password next, or refuses"


@pytest.mark.parametrize("user", ["app", "postgres"])
@pytest.mark.parametrize("service", SERVERS)
def test_nobody_gets_in_without_the_password(stack: Stack, service: str, user: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(login(stack, service, "''", user))
    with pytest.raises(psycopg.OperationalError, match=r"(password|SASL) authentication failed"):
        psycopg.connect(login(stack, service, "wrong", user))


def test_sockets_and_files_in_the_container_open_no_way_in_either(stack: Stack) -> None:
    rules = "select string_agg(distinct auth_method, ' ') from pg_hba_file_rules"
    weak = "select count(*) from pg_authid where rolpassword not like 'SCRAM-SHA-256$%'"
    superuser = f'PGPASSWORD=$(cat /run/connlab/postgres_password) psql -qAt -U postgres -c "{rules}" -c "{weak}"'
    assert stack.exec("postgres", "bash", "-c", superuser).split() == ["scram-sha-256", "0"]
    without = ("psql", "--no-password", "-U", "postgres", "-c", "select 1")
    assert "no password supplied" in stack.exec("postgres", *without, options=("-e", "PGPASSFILE="), check=False)


def test_jupyter_wants_the_token(stack: Stack) -> None:
    path, token = f"/api/contents/{NOTEBOOK}?content=0", stack.secret("jupyter_token", "jupyter")
    assert status(stack, path, token=token) == 200
    assert status(stack, path) == 403
    assert status(stack, path, token="wrong") == 403
    assert status(stack, "/api/kernels", method="POST") == 403
    assert status(stack, path, token=token, host="elsewhere.example") == 403, "a foreign page could reach it by name"


def test_the_address_that_it_prints_opens_the_course(stack: Stack) -> None:
    address = stack.exec("jupyter", "connlab-address").strip()
    place = f"http://127.0.0.1:{stack.ports['jupyter']}"
    assert address.startswith(f"{place}/lab/tree/{NOTEBOOK}?token=")
    assert status(stack, address.removeprefix(place)) == 200


def test_jupyter_and_pgbouncer_run_without_any_right(stack: Stack) -> None:
    for service in ("jupyter", "pgbouncer"):
        (container,) = stack.left("ps", "--filter", f"label=com.docker.compose.service={service}")
        owners = {line.split()[1] for line in run("docker", "top", container, "-eo", "pid,uid").splitlines()[1:]}
        assert owners == {"1000" if service == "jupyter" else "999"}
        capabilities = stack.exec(service, "grep", "-E", "^Cap(Eff|Prm|Bnd)|^NoNewPrivs", "/proc/1/status").split()
        assert capabilities[1::2] == ["0" * 16, "0" * 16, "0" * 16, "1"]


def test_the_learner_cannot_read_the_servers_passwords(stack: Stack) -> None:
    for name in ("postgres_password", "app_password", "pgpass", "userlist.txt"):
        assert "Permission denied" in stack.exec("jupyter", "cat", f"/run/connlab/{name}", check=False)
    listed = stack.exec("postgres", "bash", "-c", "stat -c '%n %a %u' /run/connlab/*").splitlines()
    modes = {Path(line.split()[0]).name: line.split()[1:] for line in listed}
    assert modes.pop("pgbouncer.ini") == ["444", "0"]
    assert set(map(tuple, modes.values())) == {("400", "999"), ("400", "1000")}


def test_the_whole_course_is_there(stack: Stack) -> None:
    ours = {
        str(path.relative_to(CHECKOUT))
        for part in ("notebooks", "labs", "solutions")
        for path in (CHECKOUT / part).rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    }
    # find complains of a part that does not exist yet, and compose mixes the two outputs in the middle of a line.
    found = stack.exec("jupyter", "sh", "-c", "find notebooks labs solutions -name '*.ipynb' 2> /dev/null; true")
    assert ours == set(found.split())


def test_a_notebook_runs_with_servers_of_its_own_and_leaves_none(stack: Stack) -> None:
    execute = ("jupyter", "nbconvert", "--execute", "--to", "notebook", "--output-dir", "/tmp", NOTEBOOK)
    stack.exec("jupyter", *execute, options=("-e", "CONNLAB_FAST=1"))
    done = json.loads(stack.exec("jupyter", "cat", "/tmp/00_start_here.ipynb"))
    cells = [cell for cell in done["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["execution_count"] for cell in cells)
    (container,) = stack.left("ps", "--filter", "label=com.docker.compose.service=jupyter")

    def left() -> list[str]:
        running = re.findall("postgres|pgbouncer", run("docker", "top", container, "-eo", "pid,comm"))
        return running + stack.exec("jupyter", "find", "/dev/shm", "-name", "postgres-*").split()

    wait_until(lambda: not left(), GONE_WITHIN)  # the watchdog sees to it once the kernel has ended
    assert left() == []


def test_no_password_is_to_be_seen(stack: Stack) -> None:
    images = {container["Image"] for container in stack.containers()}
    seen = {
        "docker inspect": json.dumps(stack.containers()),
        "docker inspect of the images": run("docker", "inspect", *images),
        "docker history": "".join(run("docker", "history", "--no-trunc", image) for image in images),
        "docker top": "".join(run("docker", "top", container) for container in stack.left("ps")),
        "docker compose config": stack.compose("config"),
        "docker compose logs": stack.compose("logs"),
        "the folder": "".join(path.read_text() for path in stack.folder.rglob("*") if path.is_file()),
    }
    assert all(seen.values())
    for name, password in stack.all_secrets().items():
        assert len(password) == 24
        assert [place for place, text in seen.items() if password in text] == [], f"{name} is to be seen"


def test_work_and_passwords_survive_down_and_up(stack: Stack) -> None:
    before = stack.all_secrets()
    stack.exec("jupyter", "bash", "-c", "echo mine > notebooks/mine.txt; echo changed > notebooks/00_start_here.ipynb")
    with psycopg.connect(login(stack, "postgres", before["app_password"])) as connection:
        connection.execute("create table kept as select 42 as answer")
    stack.compose("down")
    assert stack.left("ps", "--all") == [] and stack.left("network", "ls") == []
    assert sorted(volumes_of(stack)) == sorted(f"{stack.project}_{name}" for name in VOLUMES)
    stack.up()
    assert stack.all_secrets() == before
    assert stack.exec("jupyter", "cat", "notebooks/mine.txt", NOTEBOOK).split() == ["mine", "changed"]
    with psycopg.connect(login(stack, "pgbouncer", before["app_password"])) as connection:
        assert connection.execute("select answer from kept").fetchone() == (42,)


def test_a_renamed_notebook_comes_new_at_the_next_start(stack: Stack) -> None:
    stack.exec("jupyter", "bash", "-c", f"echo mine > {NOTEBOOK}; mv {NOTEBOOK} notebooks/mine.ipynb")
    stack.compose("restart", "jupyter")
    stack.up()
    assert json.loads(stack.exec("jupyter", "cat", NOTEBOOK))["cells"]
    assert stack.exec("jupyter", "cat", "notebooks/mine.ipynb") == "mine\n"


def test_down_with_its_volumes_leaves_nothing_at_all(stack: Stack) -> None:
    mounted = {mount["Name"] for container in stack.containers() for mount in container["Mounts"] if "Name" in mount}
    assert mounted == set(volumes_of(stack)), "a volume without a name would stay behind"
    stack.compose("down", "--volumes")
    for listing in (("ps", "--all"), ("network", "ls"), ("volume", "ls")):
        assert stack.left(*listing) == []
    assert not mounted & set(run("docker", "volume", "ls", "--quiet").split())


def volumes_of(stack: Stack) -> list[str]:
    """Every volume that has to do with the project, labelled or not."""
    everything = run("docker", "volume", "ls", "--quiet").split()
    return [name for name in everything if name in stack.left("volume", "ls") or name.startswith(stack.project)]
