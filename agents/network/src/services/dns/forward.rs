//! Asking others: a query goes on as it came, one server after the other.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use uuid::Uuid;

use super::answer::Transport;

/// Time that one server has to answer.
const LIMIT: Duration = Duration::from_secs(2);

/// The longest answer that is taken by UDP.
const LONGEST: usize = 4096;

/// Servers that are asked at most.
const MOST_SERVERS: usize = 3;

/// What the first of `servers` to answer says, or nothing if none does.
pub(super) async fn ask(servers: &[IpAddr], query: &[u8], by: Transport) -> Option<Vec<u8>> {
    let own_id = query.first_chunk::<2>()?;
    let mut asked = query.to_vec();
    for server in servers.iter().take(MOST_SERVERS) {
        // A number of our own: the guest's could be guessed by its neighbours.
        let [a, b, ..] = Uuid::new_v4().into_bytes();
        asked[..2].copy_from_slice(&[a, b]);
        let server = SocketAddr::new(*server, 53);
        let answered = match by {
            Transport::Udp => timeout(LIMIT, ask_udp(server, &asked)).await,
            Transport::Tcp => timeout(LIMIT, ask_tcp(server, &asked)).await,
        };
        if let Ok(Ok(mut answer)) = answered {
            answer[..2].copy_from_slice(own_id);
            return Some(answer);
        }
    }
    None
}

async fn ask_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any = match server.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    // A port of its own for every query, which the kernel chooses at random.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut answer = vec![0; LONGEST];
    loop {
        let length = socket.recv(&mut answer).await?;
        if answers(query, &answer[..length]) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn ask_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(query.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut sent = length.to_be_bytes().to_vec();
    sent.extend_from_slice(query);
    stream.write_all(&sent).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    if answers(query, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Whether `answer` is one to `query`: same number, a response, the same question. Servers may
/// change the case of nothing, so bytes are compared.
fn answers(query: &[u8], answer: &[u8]) -> bool {
    let header = |bytes: &[u8]| bytes.first_chunk::<12>().copied();
    let (Some(asked), Some(told)) = (header(query), header(answer)) else { return false };
    let question = |bytes: &[u8]| question_end(bytes).map(|end| bytes[12..end].to_vec());
    let same = match (question(query), question(answer)) {
        (Some(asked), Some(told)) => asked.eq_ignore_ascii_case(&told),
        // Some servers leave the question out of a failure.
        (Some(_), None) => told[4..6] == [0, 0],
        _ => false,
    };
    asked[..2] == told[..2] && told[2] & 0x80 != 0 && same
}

/// Where the first question ends.
fn question_end(bytes: &[u8]) -> Option<usize> {
    if bytes.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = 12;
    loop {
        match usize::from(*bytes.get(at)?) {
            0 => break,
            length @ 1..=63 => at += 1 + length,
            // A first name has nothing to point back to.
            _ => return None,
        }
    }
    (at + 5 <= bytes.len()).then_some(at + 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03www\x07example\0\0\x01\0\x01";

    #[test]
    fn only_an_answer_to_the_question_is_one() {
        let mut good = QUERY.to_vec();
        good[2] |= 0x80;
        assert!(answers(QUERY, &good));
        for at in [0, 13, 26] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(!answers(QUERY, &bad), "byte {at}");
        }
        assert!(!answers(QUERY, QUERY), "a query is no answer");
        assert!(!answers(QUERY, &good[..20]));
    }
}
