//! The network interfaces that `--net` names.

use std::ffi::OsString;

use anyhow::{Result, ensure};
use cli::list::List;
use common::virtio::net::passt::Passt;
use common::virtio::net::tap::Tap;
use common::virtio::net::{self, Mac, Net};
use serde::{Deserialize, Serialize};

/// A network interface as the command line has it: `tap=NAME` or `user`, and `mac=ADDRESS`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    link: Link,
    mac: Option<Mac>,
}

/// Where its frames go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Link {
    Tap(String),
    User,
}

impl Interface {
    /// Parses the value of `--net`.
    pub fn parse(text: OsString) -> Result<Self, String> {
        let readable = |text: OsString| text.to_string_lossy().into_owned();
        let mut list = List::parse(&text)?;
        let user = list.word(&[("user", ())])?.map(|()| Link::User);
        let tap = list.value("tap", "NAME")?.map(|name| Link::Tap(readable(name)));
        let mac = list.value("mac", "ADDRESS")?.map(|mac| readable(mac).parse()).transpose()?;
        list.end()?;
        match (user, tap) {
            (Some(link), None) | (None, Some(link)) => Ok(Self { link, mac }),
            _ => Err("expected one of tap=NAME and user".to_owned()),
        }
    }

    /// The device, the machine's network interface `number`.
    pub fn open(&self, number: usize) -> Result<Net, net::Error> {
        let mac = self.mac(number);
        Ok(match &self.link {
            Link::Tap(name) => Net::new(Tap::open(name)?, mac),
            Link::User => Net::new(Passt::start()?, mac),
        })
    }

    fn mac(&self, number: usize) -> Mac {
        let link = match &self.link {
            Link::Tap(name) => name,
            Link::User => "user",
        };
        self.mac.unwrap_or_else(|| Mac::for_link(link, number))
    }

    /// This link in the place of an `old` one that a guest knows.
    pub fn in_place_of(&self, old: &Self) -> Result<Self> {
        if let (Some(new), Some(mac)) = (self.mac, old.mac) {
            ensure!(new == mac, "--net: the saved guest's interface has mac={mac}, and keeps it");
        }
        Ok(Self { link: self.link.clone(), mac: old.mac })
    }

    /// With the address that it has as the machine's network interface `number`, on whatever host.
    pub fn to_keep(&self, number: usize) -> Self {
        Self { mac: Some(self.mac(number)), ..self.clone() }
    }
}
