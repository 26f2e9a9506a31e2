"""A client that is not ssh: all it knows of us is a ProxyCommand.

Usage: paramiko_client.py PROXY_COMMAND KNOWN_HOSTS KEY PORT LARGE_FILE DIRECTORY HOST...

Connects to all hosts, and while all connections are open runs a command on each and copies the file
there and back by SFTP. Prints what each host said. Ends with 3 if a host's key is not the known one.
"""

import getpass
import shlex
import sys

import paramiko


def connect(proxy_command, known_hosts, key, host, port):
    client = paramiko.SSHClient()
    client.load_host_keys(known_hosts)
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    client.connect(
        host,
        port,
        username=getpass.getuser(),
        key_filename=key,
        sock=paramiko.ProxyCommand(f"{proxy_command} {shlex.quote(host)} {port}"),
        allow_agent=False,
        look_for_keys=False,
        timeout=30,
        banner_timeout=30,
        auth_timeout=30,
    )
    return client


def main():
    proxy_command, known_hosts, key, port, large_file, directory, *hosts = sys.argv[1:]
    try:
        clients = {host: connect(proxy_command, known_hosts, key, host, int(port)) for host in hosts}
    except paramiko.BadHostKeyException as error:
        print(error, file=sys.stderr)
        return 3
    for host, client in clients.items():
        _, stdout, _ = client.exec_command("echo $SSH_CONNECTION", timeout=30)
        print(stdout.read().decode().strip())
        if stdout.channel.recv_exit_status() != 0:
            return 1
        with client.open_sftp() as sftp:
            there = f"{directory}/there-{host}"
            sftp.put(large_file, there)
            sftp.get(there, f"{directory}/back-{host}")
    for client in clients.values():
        client.close()
    return 0


sys.exit(main())
