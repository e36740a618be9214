"""What runs on a host: sockets, processes, files, libvirt and figures; and the shell that the root runs in as well."""
