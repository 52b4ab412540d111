//! `https://host[:port]`, and nothing else, of a server elsewhere.

use std::{fmt, str::FromStr};

use vmseal_api::paths::API_PORT;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServerUrl {
    /// Name or address; an IPv6 address without its brackets.
    pub(crate) host: String,
    /// TCP port.
    pub(crate) port: u16,
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not a server: write https://HOST or https://HOST:PORT");
        if text.starts_with("http://") {
            return Err(format!("'{text}' is not encrypted; the server speaks https only"));
        }
        let authority = text.strip_prefix("https://").ok_or_else(wrong)?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or_else(wrong)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?;
                match rest.strip_prefix(':') {
                    Some(port) => (host, Some(port)),
                    None if rest.is_empty() => (host, None),
                    None => return Err(wrong()),
                }
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':' | '_');
        if host.is_empty() || !host.chars().all(name) {
            return Err(wrong());
        }
        let port = port.map_or(Ok(API_PORT), |p| p.parse().map_err(|_| wrong()))?;
        Ok(Self { host: host.to_owned(), port })
    }
}

impl ServerUrl {
    /// `host:port`, as the Host header wants it.
    pub(crate) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_is_a_host_and_perhaps_a_port() {
        for (text, shown) in [
            ("https://kms.example", "https://kms.example:7443"),
            ("https://kms.example:8443/", "https://kms.example:8443"),
            ("https://10.0.0.1", "https://10.0.0.1:7443"),
            ("https://[::1]:9", "https://[::1]:9"),
            ("https://[fe80::1]", "https://[fe80::1]:7443"),
        ] {
            assert_eq!(text.parse::<ServerUrl>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn address_that_is_not_plainly_a_server_is_refused() {
        for bad in [
            "kms",
            "http://kms",
            "https://",
            "https://kms/v1",
            "https://u@kms",
            "https://kms:0x1",
            "https://kms:70000",
            "https://[::1",
            "https://[::1]9",
            "https://[kms]",
            "https://a b",
        ] {
            assert!(bad.parse::<ServerUrl>().is_err(), "{bad}");
        }
    }
}
