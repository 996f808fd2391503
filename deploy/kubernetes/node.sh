#!/bin/sh
# What the DaemonSet's init container does on its node: installs. And `uninstall`, by hand in a pod of it.
# The node's root is at /host; the agent itself runs there as a systemd unit and does not end with the pod.
set -eu

install() {
    if [ -f /config/config.toml ]; then
        mkdir -p /host/etc/sluice
        cp /config/config.toml /host/etc/sluice/config.toml
    fi
    xtask install --root /host --binary /usr/local/bin/sluice --no-verify
    chroot /host modprobe -a erofs fuse loop overlay
    chroot /host systemctl daemon-reload
    chroot /host systemctl enable sluice.socket sluice.service
    chroot /host systemctl start sluice.socket
    chroot /host systemctl restart sluice.service
    # Containers go on while containerd restarts.
    chroot /host systemctl try-restart containerd.service
}

case "$1" in
install) install ;;
uninstall)
    # The node's label becomes false by itself: nothing is streamed without an agent.
    chroot /host /usr/local/bin/sluice node drain
    chroot /host systemctl disable --now sluice.socket sluice.service
    xtask uninstall --root /host
    chroot /host systemctl daemon-reload
    chroot /host systemctl try-restart containerd.service
    ;;
*)
    echo "usage: node.sh install|uninstall" >&2
    exit 2
    ;;
esac
