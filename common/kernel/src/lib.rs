//! Netlink sockets, network namespaces and running host programs.
