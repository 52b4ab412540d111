//! What stands inside the handshake's options. Bytes in, meaning out; nothing here does I/O.

/// An option whose content is not what the protocol says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// Content of `OPT_INFO` and `OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ExportQuery<'a> {
    pub(super) name: &'a [u8],
    pub(super) infos: Vec<u16>,
}

/// Content of `OPT_LIST_META_CONTEXT` and `OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContextQuery<'a> {
    pub(super) name: &'a [u8],
    pub(super) queries: Vec<&'a [u8]>,
}

impl<'a> ExportQuery<'a> {
    pub(super) fn parse(content: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = Rest(content);
        let name = rest.text()?;
        let count = rest.u16()?;
        let infos = (0..count).map(|_| rest.u16()).collect::<Result<_, _>>()?;
        rest.end(Self { name, infos })
    }
}

impl<'a> ContextQuery<'a> {
    pub(super) fn parse(content: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = Rest(content);
        let name = rest.text()?;
        let count = rest.u32()?;
        // Each takes four bytes at least: a count that cannot be true is refused before anything is stored.
        if count as usize > rest.0.len() / 4 {
            return Err(Malformed);
        }
        let queries = (0..count).map(|_| rest.text()).collect::<Result<_, _>>()?;
        rest.end(Self { name, queries })
    }
}

/// What is not read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = tail;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_be_bytes)
    }

    /// A length and that many bytes.
    fn text(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.u32()? as usize;
        let (text, rest) = self.0.split_at_checked(len).ok_or(Malformed)?;
        self.0 = rest;
        Ok(text)
    }

    fn end<T>(self, value: T) -> Result<T, Malformed> {
        if self.0.is_empty() { Ok(value) } else { Err(Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_informations_and_queries_are_found() {
        let content = [b"\0\0\0\x02ab".as_slice(), &[0, 2, 0, 1, 0, 3]].concat();
        assert_eq!(ExportQuery::parse(&content), Ok(ExportQuery { name: b"ab", infos: vec![1, 3] }));
        let content = b"\0\0\0\0\0\0\0\x02\0\0\0\x01x\0\0\0\0";
        assert_eq!(ContextQuery::parse(content), Ok(ContextQuery { name: b"", queries: vec![b"x", b""] }));
    }

    #[test]
    fn cut_short_too_long_and_lying_contents_are_malformed() {
        let content = [b"\0\0\0\x02ab".as_slice(), &[0, 1, 0, 1]].concat();
        for cut in 0..content.len() {
            assert_eq!(ExportQuery::parse(&content[..cut]), Err(Malformed));
        }
        assert_eq!(ExportQuery::parse(&[content.as_slice(), &[0]].concat()), Err(Malformed));
        assert_eq!(ContextQuery::parse(b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0"), Err(Malformed));
        assert_eq!(ContextQuery::parse(b"\xff\xff\xff\xff"), Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(content in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = ExportQuery::parse(&content);
            let _ = ContextQuery::parse(&content);
        }

        #[test]
        fn nearly_right_contents_do_not_panic(
            name in proptest::collection::vec(any::<u8>(), 0..20), claimed in 0u32..40, count in 0u32..8,
            tail in proptest::collection::vec(any::<u8>(), 0..60)
        ) {
            let mut content = claimed.to_be_bytes().to_vec();
            content.extend(&name);
            content.extend(count.to_be_bytes());
            content.extend(&tail);
            let _ = ExportQuery::parse(&content);
            let _ = ContextQuery::parse(&content);
        }
    }
}
