//! How much went over a master's link: the kernel's counters of its TCP connection.
//!
//! A line here must not speak to a master, nor ask the kernel once for each of them.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::fd::AsRawFd,
    path::Path,
    time::{Duration, Instant},
};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags, nlas::Nla},
};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, setsockopt,
            sockopt::ReceiveTimeout,
        },
        time::{TimeVal, TimeValLike},
    },
};

/// How long the kernel may take to list the connections; it needs a few milliseconds for thousands.
const DUMP_BOUND: Duration = Duration::from_secs(1);
/// The kernel sends at most 32 KiB at once (`netlink_dump` in net/netlink/af_netlink.c).
const DATAGRAM_SIZE: usize = 64 * 1024;

/// What went over a master's link since it was started, in bytes: the payload of its TCP connection, so encrypted
/// and maybe compressed, with what SSH itself adds, without IP and TCP headers. From `struct tcp_info` (Linux 5.4 or
/// later, include/uapi/linux/tcp.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes sent to the host that it has acknowledged (`tcpi_bytes_acked`); repetitions are not counted.
    pub sent: u64,
    /// Bytes received from the host (`tcpi_bytes_received`).
    pub received: u64,
}

/// The traffic of the masters with these processes, as far as it is known. `unix_sockets` is what `/proc/net/unix`
/// says. Takes a second at most; without masters nobody is asked.
///
/// It is not known of a master whose link is no TCP socket (a ProxyCommand's pipes, or a stream of another master),
/// that is in another network namespace or belongs to another user, and where the kernel has no `tcp_diag`.
pub(super) fn of(masters: impl Iterator<Item = u32>, unix_sockets: &str) -> HashMap<u32, Traffic> {
    let sockets: Vec<(u32, Vec<u32>)> = masters.map(|pid| (pid, sockets(pid))).collect();
    if sockets.iter().all(|(_, inodes)| inodes.is_empty()) {
        return HashMap::new();
    }
    let deadline = Instant::now() + DUMP_BOUND;
    let mut connections = HashMap::new();
    for family in [AF_INET, AF_INET6] {
        if let Err(error) = dump(family, deadline, &mut connections) {
            tracing::debug!(family, %error, "the kernel does not list TCP connections");
        }
    }
    let listening = listening(unix_sockets);
    let known =
        sockets.into_iter().filter_map(|(pid, inodes)| Some((pid, link(&inodes, &connections, &listening)?)));
    known.collect()
}

/// Of a master's sockets, in the order of descriptors, the one to its host. ssh opens it before its control socket, and
/// every descriptor that comes later is higher; so forwards that somebody asked for are not taken for it.
fn link(inodes: &[u32], connections: &HashMap<u32, Traffic>, listening: &HashSet<u32>) -> Option<Traffic> {
    let early = inodes.iter().take_while(|inode| !listening.contains(inode));
    early.filter_map(|inode| connections.get(inode)).next().copied()
}

/// The inodes of a process's sockets, lowest descriptor first; none if we may not look.
fn sockets(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut found: Vec<(u32, u32)> = entries
        .filter_map(|entry| {
            let descriptor = entry.file_name().to_str()?.parse().ok()?;
            Some((descriptor, inode(&fs::read_link(entry.path()).ok()?)?))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, inode)| inode).collect()
}

/// `socket:[INODE]`; see `sockfs_dname` in net/socket.c.
fn inode(descriptor: &Path) -> Option<u32> {
    descriptor.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The inodes of the unix sockets that listen, from `/proc/net/unix`.
fn listening(table: &str) -> HashSet<u32> {
    /// Where the flags stand and the inode, and `__SO_ACCEPTCON`; see `unix_seq_show` in net/unix/af_unix.c.
    const FLAGS: usize = 3;
    const INODE: usize = 6;
    const LISTENS: &str = "00010000";
    let rows = table.lines().skip(1).filter_map(|line| {
        let mut rest = line.split_whitespace();
        let (flags, inode) = (rest.nth(FLAGS)?, rest.nth(INODE - FLAGS - 1)?);
        (flags == LISTENS).then(|| inode.parse().ok())?
    });
    rows.collect()
}

/// Adds the established TCP connections of a family, by inode: one question to the kernel (sock_diag(7)).
fn dump(family: u8, deadline: Instant, connections: &mut HashMap<u32, Traffic>) -> Result<(), Errno> {
    let socket = socket::socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    // A socket that is not connected sends to the kernel.
    socket::send(socket.as_raw_fd(), &request(family), MsgFlags::empty())?;
    let mut buffer = vec![0; DATAGRAM_SIZE];
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        if left == 0 {
            return Err(Errno::ETIMEDOUT);
        }
        setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(left as i64))?;
        match socket::recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => {
                if read(&buffer[..length], connections)? {
                    return Ok(());
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn request(family: u8) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let question = SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::INFO,
        states: StateFlags::ESTABLISHED,
        socket_id: if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() },
    });
    let mut message = NetlinkMessage::new(header, question.into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// Reads a datagram of the answer; true when it was the last one. What is not understood is left out, for it is
/// hardly about us.
fn read(mut datagram: &[u8], connections: &mut HashMap<u32, Traffic>) -> Result<bool, Errno> {
    while let Ok(frame) = NetlinkBuffer::new_checked(&datagram) {
        let length = frame.length() as usize;
        if let Ok(message) = NetlinkMessage::<SockDiagMessage>::deserialize(datagram) {
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(true),
                NetlinkPayload::Error(error) => return Err(Errno::from_raw(-error.raw_code())),
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(connection)) => {
                    let traffic = connection.nlas.iter().find_map(|attribute| match attribute {
                        Nla::TcpInfo(info) => {
                            Some(Traffic { sent: info.bytes_acked, received: info.bytes_received })
                        }
                        _ => None,
                    });
                    connections.extend(traffic.map(|traffic| (connection.header.inode, traffic)));
                }
                _ => {}
            }
        }
        // Messages begin at multiples of four.
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::unix::fs::MetadataExt,
    };

    use super::*;

    /// An answer about one connection, laid out by hand as in linux/netlink.h, linux/inet_diag.h and linux/tcp.h.
    fn answer(inode: u32, acked: u64, received: u64, info_len: usize) -> Vec<u8> {
        let mut info = vec![0; 232];
        info[120..128].copy_from_slice(&acked.to_ne_bytes());
        info[128..136].copy_from_slice(&received.to_ne_bytes());
        info.resize(info_len, 0);
        let mut body = vec![AF_INET, 1, 0, 0];
        body.resize(68, 0);
        body.extend(inode.to_ne_bytes());
        // An attribute of one byte (INET_DIAG_SHUTDOWN), with its padding, and INET_DIAG_INFO.
        body.extend([5u16, 8].map(u16::to_ne_bytes).concat());
        body.extend([0; 4]);
        body.extend([4 + info.len() as u16, 2].map(u16::to_ne_bytes).concat());
        body.extend(info);
        message(20, &body)
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = (16 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(16, 0);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn counters_are_read_and_what_is_not_understood_is_left_out() {
        let mut connections = HashMap::new();
        // The second one is of a kernel that knows less, the third of one that knows more.
        let datagram =
            [answer(7, 1 << 40, 300, 232), answer(8, 1, 2, 192), answer(9, 5, 6, 280), message(20, &[99; 8])];
        assert_eq!(read(&datagram.concat(), &mut connections), Ok(false));
        let expected = [(7, Traffic { sent: 1 << 40, received: 300 }), (9, Traffic { sent: 5, received: 6 })];
        assert_eq!(connections, HashMap::from(expected));
        let last = [answer(10, 1, 1, 232), message(3, &[0; 4])].concat();
        assert_eq!(read(&last, &mut connections), Ok(true));
        assert_eq!(connections.len(), 3);
        let refusal = message(2, &[(-2i32).to_ne_bytes().to_vec(), vec![0; 16]].concat());
        assert_eq!(read(&refusal, &mut connections), Err(Errno::ENOENT));
        assert_eq!(read(&datagram.concat()[..100], &mut connections), Ok(false), "cut short");
        assert_eq!(read(&[], &mut connections), Ok(false));
    }

    #[test]
    fn the_link_is_opened_before_the_control_socket() {
        let traffic = |sent| Traffic { sent, received: 0 };
        let connections = HashMap::from([(11, traffic(1)), (12, traffic(2))]);
        let listening = HashSet::from([20]);
        for (sockets, expected) in [
            (&[11, 20, 12][..], Some(traffic(1))),
            (&[5, 12, 11, 20], Some(traffic(2))),
            // Through a pipe, with a forward; in another network namespace; without any.
            (&[20, 11], None),
            (&[5, 6, 20], None),
            (&[], None),
        ] {
            assert_eq!(link(sockets, &connections, &listening), expected, "{sockets:?}");
        }
    }

    #[test]
    fn listening_sockets_are_found_by_their_flags() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000000000000000: 00000002 00000000 00010000 0001 01 2578798 /run/a b.sock\n\
                     0000000000000000: 00000003 00000000 00000000 0001 03 2578799 /run/a b.sock\n\
                     0000000000000000: 00000002 00000000 00010000 0005 01 18\n\
                     0000000000000000: 00000002\n";
        assert_eq!(listening(table), HashSet::from([2_578_798, 18]));
        assert_eq!(inode(Path::new("socket:[17]")), Some(17));
        for other in ["pipe:[17]", "/dev/null", "socket:[17", "anon_inode:[eventfd]"] {
            assert_eq!(inode(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn the_kernel_counts_what_goes_over_a_connection() {
        const SENT: usize = 100_000;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = listener.accept().unwrap().0;
        let writer = std::thread::spawn(move || {
            near.write_all(&[1; SENT]).unwrap();
            near
        });
        far.read_exact(&mut [0; SENT]).unwrap();
        let near = writer.join().unwrap();
        let inode_of = |stream: &TcpStream| {
            let path = format!("/proc/self/fd/{}", stream.as_raw_fd());
            fs::metadata(path).unwrap().ino() as u32
        };
        let own = sockets(std::process::id());
        assert!(own.contains(&inode_of(&near)) && own.contains(&inode_of(&far)), "{own:?}");
        let mut connections = HashMap::new();
        dump(AF_INET, Instant::now() + DUMP_BOUND, &mut connections).unwrap();
        let (near, far) = (connections[&inode_of(&near)], connections[&inode_of(&far)]);
        assert_eq!(far.received, SENT as u64);
        // The acknowledgement of the SYN counts as one byte.
        assert!((SENT as u64..=SENT as u64 + 1).contains(&near.sent), "{near:?}");
        assert_eq!((near.received, far.sent), (0, 0));
        assert_eq!(dump(AF_INET6, Instant::now(), &mut connections), Err(Errno::ETIMEDOUT));
    }
}
