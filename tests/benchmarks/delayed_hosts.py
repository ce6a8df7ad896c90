"""Prints the seconds of a round trip over hosts 20 ms apart, and how many bytes came at once."""

import subprocess
import sys

from benchmarks import network

SIZE = 300_000
ECHO = f"""
import socket
connection, _ = socket.create_server(("", 5000)).accept()
connection.sendall(connection.recv(1))
received = 0
while received < {SIZE}:
    received += len(connection.recv(2**20))
print(received)
"""
CALL = f"""
import socket, time
for _ in range(100):
    try:
        connection = socket.create_connection(("host1", 5000))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
start = time.perf_counter()
connection.sendall(b"x")
connection.recv(1)
print(time.perf_counter() - start, flush=True)
connection.sendall(bytes({SIZE}))
connection.recv(1)
"""

if __name__ == "__main__":
    network.isolate("tests.benchmarks.delayed_hosts")
    hosts = network.Hosts(2, latency=0.02)
    commands = [
        hosts.command(host, [sys.executable, "-c", text]) for host, text in ((1, ECHO), (0, CALL))
    ]
    processes = [subprocess.Popen(command) for command in commands]
    sys.exit(max(process.wait() for process in processes))
