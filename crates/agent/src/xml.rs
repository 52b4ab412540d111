//! A small XML tree that keeps what it does not know.
//!
//! In goes a document as libvirt or virt-install writes it, out comes the same document in meaning: elements,
//! attributes and their order, namespaces as they were written, comments, processing instructions, CDATA and white
//! space. It has no DTD and no entities but the five of XML and character references; size and depth are bounded.
//! It knows nothing of domains: that is [`crate::domain_xml`].

use quick_xml::{Reader, XmlVersion, escape, events::Event};

/// Most bytes of a document: libvirt accepts metadata of a few MB (measured).
pub const MAX_BYTES: usize = 8 << 20;
/// Deepest nesting; libvirt's own documents stay below 12.
pub const MAX_DEPTH: usize = 100;

/// Why a text is not a document this program reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum XmlError {
    /// More than [`MAX_BYTES`].
    #[error("the XML has {bytes} bytes, at most {MAX_BYTES} are read")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("the XML is nested deeper than {MAX_DEPTH} elements")]
    TooDeep,
    /// Not well-formed.
    #[error("the XML is not well-formed at byte {position}: {reason}")]
    Malformed {
        /// Where.
        position: u64,
        /// What is wrong.
        reason: String,
    },
    /// It has a DTD.
    #[error("the XML has a document type declaration, which is not accepted")]
    DocumentType,
    /// A second document follows.
    #[error(
        "the XML holds more than one document (virt-install prints one per installation step: use --print-step 1)"
    )]
    SecondDocument,
    /// Nothing in it.
    #[error("the XML holds no element")]
    Empty,
    /// Not the document that is needed.
    #[error("the XML is a <{found}>, a <{wanted}> is needed")]
    Root {
        /// Name of its root.
        found: String,
        /// What is needed.
        wanted: &'static str,
    },
    /// No disk of that name.
    #[error("the domain has no disk {target}")]
    NoDisk {
        /// The name.
        target: String,
    },
    /// There already is a disk of that name.
    #[error("the domain already has a disk {target}")]
    DiskExists {
        /// The name.
        target: String,
    },
    /// Our own metadata element is damaged.
    #[error("the vmseal metadata of the domain is damaged: {reason}")]
    Metadata {
        /// What is wrong.
        reason: String,
    },
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// An element.
    Element(Element),
    /// Character data, decoded.
    Text(String),
    /// A CDATA section.
    CData(String),
    /// A comment.
    Comment(String),
    /// A processing instruction, without `<?` and `?>`.
    Instruction(String),
}

/// An element: its name as written, attributes in order, children in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Element {
    /// Name with its prefix.
    pub name: String,
    /// Names with prefixes, values decoded. Namespace declarations are among them.
    pub attributes: Vec<(String, String)>,
    /// What is inside.
    pub children: Vec<Node>,
}

/// A document: what stands before the root, the root, what stands after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Declaration, comments, white space before the root.
    pub before: Vec<Node>,
    /// The root.
    pub root: Element,
    /// Comments and white space after it.
    pub after: Vec<Node>,
}

impl Document {
    /// Reads a document.
    ///
    /// # Errors
    ///
    /// [`XmlError`]; nothing is read past the first defect.
    pub fn parse(text: &str) -> Result<Self, XmlError> {
        if text.len() > MAX_BYTES {
            return Err(XmlError::TooLong { bytes: text.len() });
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut builder = Builder::default();
        let mut reader = Reader::from_str(text);
        reader.config_mut().check_comments = true;
        loop {
            let event = reader.read_event().map_err(|e| malformed(reader.error_position(), &e))?;
            let at = reader.buffer_position();
            match event {
                Event::Eof => return builder.finish(),
                other => builder.take(other, at)?,
            }
        }
    }

    /// The document as text.
    pub fn to_xml(&self) -> String {
        let mut out = String::new();
        for node in &self.before {
            write_node(node, &mut out);
        }
        write_element(&self.root, &mut out);
        for node in &self.after {
            write_node(node, &mut out);
        }
        out
    }
}

impl Element {
    /// An empty element.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// The same with one more attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.set(name, value);
        self
    }

    /// The same with one more child.
    #[must_use]
    pub fn with_child(mut self, child: Self) -> Self {
        self.children.push(Node::Element(child));
        self
    }

    /// The value of an attribute.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Sets an attribute where it stands, or as the last one.
    pub fn set(&mut self, name: &str, value: &str) {
        match self.attributes.iter_mut().find(|(key, _)| key == name) {
            Some((_, old)) => *old = value.to_owned(),
            None => self.attributes.push((name.to_owned(), value.to_owned())),
        }
    }

    /// Removes an attribute.
    pub fn unset(&mut self, name: &str) {
        self.attributes.retain(|(key, _)| key != name);
    }

    /// Child elements.
    pub fn elements(&self) -> impl Iterator<Item = &Self> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// Child elements, to be changed.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Self> {
        self.children.iter_mut().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// The first child element of that name.
    pub fn child(&self, name: &str) -> Option<&Self> {
        self.elements().find(|element| element.name == name)
    }

    /// The first child element of that name, to be changed.
    pub fn child_mut(&mut self, name: &str) -> Option<&mut Self> {
        self.elements_mut().find(|element| element.name == name)
    }

    /// Place of the first child element of that name among the children.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.children.iter().position(|node| matches!(node, Node::Element(e) if e.name == name))
    }

    /// Text and CDATA directly inside.
    pub fn text(&self) -> String {
        self.children
            .iter()
            .filter_map(|node| match node {
                Node::Text(text) | Node::CData(text) => Some(text.as_str()),
                _ => None,
            })
            .collect()
    }

    /// Removes the child at `index` together with the white space before it, so that no empty line stays.
    pub fn remove_child(&mut self, index: usize) {
        self.children.remove(index);
        if let Some(before) = index.checked_sub(1)
            && matches!(&self.children[before], Node::Text(text) if text.trim().is_empty())
        {
            self.children.remove(before);
        }
    }

    /// Adds a child as the last element, indented like the one before it.
    pub fn append(&mut self, child: Self) {
        let last = self.children.iter().rposition(|node| matches!(node, Node::Element(_)));
        match last {
            Some(last) => {
                let indent = match last.checked_sub(1).map(|i| &self.children[i]) {
                    Some(Node::Text(text)) if text.trim().is_empty() => Some(Node::Text(text.clone())),
                    _ => None,
                };
                self.children.insert(last + 1, Node::Element(child));
                if let Some(indent) = indent {
                    self.children.insert(last + 1, indent);
                }
            }
            None => self.children.push(Node::Element(child)),
        }
    }

    /// Name without its prefix.
    pub fn local_name(&self) -> &str {
        self.name.split_once(':').map_or(self.name.as_str(), |(_, local)| local)
    }

    /// The namespace declared on this very element for a prefix (`""`: the default namespace).
    pub fn declares(&self, prefix: &str) -> Option<&str> {
        self.attributes.iter().find_map(|(key, value)| {
            let declared = if key == "xmlns" { "" } else { key.strip_prefix("xmlns:")? };
            (declared == prefix).then_some(value.as_str())
        })
    }

    /// The namespace of this element; `ancestors` from the root down.
    pub fn namespace<'a>(&'a self, ancestors: &[&'a Self]) -> Option<&'a str> {
        let prefix = self.name.split_once(':').map_or("", |(prefix, _)| prefix);
        let found = self.declares(prefix).or_else(|| ancestors.iter().rev().find_map(|e| e.declares(prefix)));
        found.filter(|uri| !uri.is_empty())
    }

    /// The element as text.
    pub fn to_xml(&self) -> String {
        let mut out = String::new();
        write_element(self, &mut out);
        out
    }
}

fn malformed(position: u64, reason: &impl ToString) -> XmlError {
    XmlError::Malformed { position, reason: reason.to_string() }
}

#[derive(Default)]
struct Builder {
    before: Vec<Node>,
    root: Option<Element>,
    after: Vec<Node>,
    open: Vec<Element>,
}

impl Builder {
    fn take(&mut self, event: Event<'_>, at: u64) -> Result<(), XmlError> {
        match event {
            Event::Start(start) => {
                if self.root.is_some() {
                    return Err(XmlError::SecondDocument);
                }
                if self.open.len() >= MAX_DEPTH {
                    return Err(XmlError::TooDeep);
                }
                self.open.push(element(&start, at)?);
            }
            Event::Empty(start) => {
                if self.root.is_some() {
                    return Err(XmlError::SecondDocument);
                }
                self.close(element(&start, at)?);
            }
            Event::End(_) => {
                let done = self.open.pop().ok_or_else(|| malformed(at, &"an end tag without a start tag"))?;
                self.close(done);
            }
            Event::Text(text) => self.add_text(&legal(text.xml10_content().into_owned(), at)?, at)?,
            Event::GeneralRef(reference) => {
                let decoded = match reference.resolve_char_ref().map_err(|e| malformed(at, &e))? {
                    Some(c) => c.to_string(),
                    None => escape::resolve_predefined_entity(&reference)
                        .ok_or_else(|| malformed(at, &format!("unknown entity &{};", &*reference)))?
                        .to_owned(),
                };
                self.add_text(&legal(decoded, at)?, at)?;
            }
            Event::CData(data) => {
                if self.open.is_empty() {
                    return Err(malformed(at, &"text outside the root element"));
                }
                let data = legal(data.xml10_content().into_owned(), at)?;
                self.add(Node::CData(data));
            }
            Event::Comment(comment) => {
                self.add(Node::Comment(legal(comment.xml10_content().into_owned(), at)?))
            }
            Event::PI(pi) => self.add(Node::Instruction(legal(pi.into_inner().into_owned(), at)?)),
            // In a second document's prologue too. Dropped: what is written is always UTF-8 and version 1.0.
            Event::Decl(_) if self.root.is_some() => return Err(XmlError::SecondDocument),
            Event::Decl(_) => {}
            Event::DocType(_) => return Err(XmlError::DocumentType),
            Event::Eof => {}
        }
        Ok(())
    }

    fn add(&mut self, node: Node) {
        match self.open.last_mut() {
            Some(parent) => parent.children.push(node),
            None if self.root.is_some() => self.after.push(node),
            None => self.before.push(node),
        }
    }

    /// Joins text that references had cut into pieces, so that white space tests see all of it.
    fn add_text(&mut self, text: &str, at: u64) -> Result<(), XmlError> {
        let siblings = match self.open.last_mut() {
            Some(parent) => &mut parent.children,
            None if !text.trim().is_empty() => return Err(malformed(at, &"text outside the root element")),
            None if self.root.is_some() => &mut self.after,
            None => &mut self.before,
        };
        match siblings.last_mut() {
            Some(Node::Text(before)) => before.push_str(text),
            _ => siblings.push(Node::Text(text.to_owned())),
        }
        Ok(())
    }

    fn close(&mut self, element: Element) {
        match self.open.last_mut() {
            Some(parent) => parent.children.push(Node::Element(element)),
            None => self.root = Some(element),
        }
    }

    fn finish(self) -> Result<Document, XmlError> {
        if let Some(open) = self.open.last() {
            return Err(XmlError::Malformed {
                position: 0,
                reason: format!("it ends inside <{}>", open.name.escape_debug()),
            });
        }
        let root = self.root.ok_or(XmlError::Empty)?;
        Ok(Document { before: self.before, root, after: self.after })
    }
}

fn element(start: &quick_xml::events::BytesStart<'_>, at: u64) -> Result<Element, XmlError> {
    let mut out = Element::new(name(start.name().0, at)?);
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|e| malformed(at, &e))?;
        let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|e| malformed(at, &e))?;
        out.attributes.push((name(attribute.key.0, at)?.to_owned(), legal(value.into_owned(), at)?));
    }
    Ok(out)
}

/// A name goes out as it came in, so it must hold nothing that would end a tag.
fn name(text: &str, at: u64) -> Result<&str, XmlError> {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, ':' | '_' | '-' | '.' | '\u{b7}');
    if text.starts_with(|c: char| c.is_alphabetic() || c == '_') && text.chars().all(plain) {
        Ok(text)
    } else {
        Err(malformed(at, &format!("'{}' is no name", text.escape_debug())))
    }
}

/// Characters of XML 1.0 (§2.2); a reference such as `&#1;` would bring in others.
fn legal(text: String, at: u64) -> Result<String, XmlError> {
    let bad = |c: char| matches!(c, '\0'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}');
    if text.contains(bad) { Err(malformed(at, &"a character that XML does not allow")) } else { Ok(text) }
}

fn write_node(node: &Node, out: &mut String) {
    match node {
        Node::Element(element) => write_element(element, out),
        Node::Text(text) => escape_into(text, false, out),
        Node::CData(data) => out.extend(["<![CDATA[", data, "]]>"]),
        Node::Comment(comment) => out.extend(["<!--", comment, "-->"]),
        Node::Instruction(instruction) => out.extend(["<?", instruction, "?>"]),
    }
}

fn write_element(element: &Element, out: &mut String) {
    out.extend(["<", &element.name]);
    for (name, value) in &element.attributes {
        out.extend([" ", name, "='"]);
        escape_into(value, true, out);
        out.push('\'');
    }
    if element.children.is_empty() {
        out.push_str("/>");
        return;
    }
    out.push('>');
    for child in &element.children {
        write_node(child, out);
    }
    out.extend(["</", &element.name, ">"]);
}

/// White space of an attribute goes out as references: a reader would turn it into blanks. `\r` always does.
fn escape_into(text: &str, attribute: bool, out: &mut String) {
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\'' if attribute => out.push_str("&apos;"),
            '"' if attribute => out.push_str("&quot;"),
            '\n' if attribute => out.push_str("&#10;"),
            '\t' if attribute => out.push_str("&#9;"),
            '\r' => out.push_str("&#13;"),
            other => out.push(other),
        }
    }
}
