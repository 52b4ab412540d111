//! The handshake: fixed newstyle, options one after another, until the peer goes on or away.

use std::io::{Read, Write};

use super::{
    NbdError,
    option::{ContextQuery, ExportQuery},
    request::Session,
    wire::*,
};
use crate::{export::Export, volume::Layout};

/// Longest content of an option. The longest sensible one is a name of 4096 bytes and a few queries.
const MAX_OPTION: usize = 16 << 10;
/// Most options of one handshake.
const MAX_OPTIONS: usize = 128;

/// Speaks the handshake; `None` if the peer went away politely.
pub(super) fn negotiate(
    socket: &mut (impl Read + Write),
    export: &Export,
) -> Result<Option<Session>, NbdError> {
    let mut greeting = [NBDMAGIC.as_slice(), IHAVEOPT].concat();
    greeting.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    socket.write_all(&greeting)?;
    let client_flags = u32::from_be_bytes(take(socket)?);
    if client_flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(NbdError::Protocol("unknown client flags"));
    }
    let no_zeroes = client_flags & u32::from(FLAG_NO_ZEROES) != 0;
    let mut session = Session::default();
    for _ in 0..MAX_OPTIONS {
        if take(socket)? != *IHAVEOPT {
            return Err(NbdError::Protocol("wrong magic before an option"));
        }
        let option = u32::from_be_bytes(take(socket)?);
        let length = u32::from_be_bytes(take(socket)?) as usize;
        if length > MAX_OPTION {
            return Err(NbdError::Protocol("option is too long"));
        }
        let mut content = vec![0; length];
        socket.read_exact(&mut content)?;
        if option == OPT_EXPORT_NAME {
            if !is_name_of(export, &content) {
                return Err(NbdError::Protocol("unknown export, asked for in a way that allows no answer"));
            }
            let mut answer = export.volume().layout().presented.to_be_bytes().to_vec();
            answer.extend(transmission_flags(&export.volume().layout(), session).to_be_bytes());
            answer.resize(answer.len() + if no_zeroes { 0 } else { 124 }, 0);
            socket.write_all(&answer)?;
            return Ok(Some(session));
        }
        let mut answers = Answers { option, bytes: Vec::new() };
        let next = answer(option, &content, export, &mut session, &mut answers);
        socket.write_all(&answers.bytes)?;
        match next {
            Next::Option => {}
            Next::Transmission => return Ok(Some(session)),
            Next::End => return Ok(None),
        }
    }
    Err(NbdError::Protocol("too many options"))
}

enum Next {
    Option,
    Transmission,
    End,
}

fn answer(
    option: u32,
    content: &[u8],
    export: &Export,
    session: &mut Session,
    answers: &mut Answers,
) -> Next {
    match option {
        OPT_ABORT => {
            answers.push(REP_ACK, &[]);
            return Next::End;
        }
        OPT_LIST if !content.is_empty() => answers.push(REP_ERR_INVALID, b"OPT_LIST has no content"),
        OPT_LIST => {
            answers.push(REP_SERVER, &with_length(export.name()));
            answers.push(REP_ACK, &[]);
        }
        OPT_STRUCTURED_REPLY if !content.is_empty() => {
            answers.push(REP_ERR_INVALID, b"OPT_STRUCTURED_REPLY has no content");
        }
        OPT_STRUCTURED_REPLY => {
            session.structured = true;
            answers.push(REP_ACK, &[]);
        }
        OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
            contexts(option == OPT_SET_META_CONTEXT, content, export, session, answers);
        }
        OPT_INFO | OPT_GO => match ExportQuery::parse(content) {
            Err(_) => answers.push(REP_ERR_INVALID, b"content of the option is malformed"),
            Ok(query) if !is_name_of(export, query.name) => {
                answers.push(REP_ERR_UNKNOWN, b"there is no export of this name");
            }
            Ok(query) => {
                describe(&query, export, *session, answers);
                answers.push(REP_ACK, &[]);
                if option == OPT_GO {
                    return Next::Transmission;
                }
            }
        },
        OPT_STARTTLS => answers.push(REP_ERR_UNSUP, b"TLS is not used on this socket"),
        _ => answers.push(REP_ERR_UNSUP, b"this server does not know the option"),
    }
    Next::Option
}

/// What is told about an export: size and flags, block sizes always (the smallest is more than one byte), its name if
/// asked for.
fn describe(query: &ExportQuery<'_>, export: &Export, session: Session, answers: &mut Answers) {
    let layout = export.volume().layout();
    let mut info = INFO_EXPORT.to_be_bytes().to_vec();
    info.extend(layout.presented.to_be_bytes());
    info.extend(transmission_flags(&layout, session).to_be_bytes());
    answers.push(REP_INFO, &info);
    let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [layout.unit as u32, 4096, MAX_PAYLOAD] {
        info.extend(size.to_be_bytes());
    }
    answers.push(REP_INFO, &info);
    if query.infos.contains(&INFO_NAME) {
        answers.push(REP_INFO, &[&INFO_NAME.to_be_bytes(), export.name().as_bytes()].concat());
    }
}

fn contexts(set: bool, content: &[u8], export: &Export, session: &mut Session, answers: &mut Answers) {
    if set {
        session.allocation = false;
    }
    if !session.structured {
        return answers.push(REP_ERR_INVALID, b"structured replies come first");
    }
    let Ok(query) = ContextQuery::parse(content) else {
        return answers.push(REP_ERR_INVALID, b"content of the option is malformed");
    };
    if !is_name_of(export, query.name) {
        return answers.push(REP_ERR_UNKNOWN, b"there is no export of this name");
    }
    let asked = |text: &str| query.queries.contains(&text.as_bytes());
    let wanted = asked(BASE_ALLOCATION) || !set && (query.queries.is_empty() || asked("base:"));
    if wanted {
        session.allocation |= set;
        // When listing, the id has no meaning and is zero.
        let id = if set { ALLOCATION_ID } else { 0 };
        answers.push(REP_META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat());
    }
    answers.push(REP_ACK, &[]);
}

/// There is one export on a socket; the empty name means it too.
fn is_name_of(export: &Export, name: &[u8]) -> bool {
    name.is_empty() || name == export.name().as_bytes()
}

fn transmission_flags(layout: &Layout, session: Session) -> u16 {
    let mut flags = TRANSMIT_HAS_FLAGS | TRANSMIT_SEND_FLUSH | TRANSMIT_SEND_FUA | TRANSMIT_CAN_MULTI_CONN;
    flags |=
        if layout.read_only { TRANSMIT_READ_ONLY } else { TRANSMIT_SEND_TRIM | TRANSMIT_SEND_WRITE_ZEROES };
    if session.structured {
        flags |= TRANSMIT_SEND_DF;
    }
    flags
}

fn with_length(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn take<const N: usize>(socket: &mut impl Read) -> Result<[u8; N], NbdError> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Replies to one option, sent together.
struct Answers {
    option: u32,
    bytes: Vec<u8>,
}

impl Answers {
    fn push(&mut self, reply: u32, content: &[u8]) {
        self.bytes.extend(REPLY_MAGIC.to_be_bytes());
        self.bytes.extend(self.option.to_be_bytes());
        self.bytes.extend(reply.to_be_bytes());
        self.bytes.extend((content.len() as u32).to_be_bytes());
        self.bytes.extend(content);
    }
}
