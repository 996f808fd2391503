#!/bin/sh
# What the DaemonSet's pod does on its node: installs at its start, keeps the node's label true while it runs.
# The node's root is at /host; the agent itself runs there as a systemd unit and does not end with this pod.
set -eu

label=sluice.dev/image-streaming
api="https://${KUBERNETES_SERVICE_HOST}:${KUBERNETES_SERVICE_PORT}/api/v1/nodes/${NODE_NAME}"
secrets=/var/run/secrets/kubernetes.io/serviceaccount

# set_label true|false: a JSON merge patch of one label.
set_label() {
    curl --silent --show-error --fail --output /dev/null --request PATCH \
        --cacert "$secrets/ca.crt" \
        --header "Authorization: Bearer $(cat "$secrets/token")" \
        --header "Content-Type: application/merge-patch+json" \
        --data "{\"metadata\":{\"labels\":{\"$label\":\"$1\"}}}" \
        "$api"
}

install() {
    if [ -f /config/config.toml ]; then
        mkdir -p /host/etc/sluice
        cp /config/config.toml /host/etc/sluice/config.toml
    fi
    xtask install --root /host --binary /usr/local/bin/sluice --no-verify
    chroot /host modprobe -a erofs fuse loop overlay
    chroot /host systemctl daemon-reload
    chroot /host systemctl enable sluice.service
    chroot /host systemctl restart sluice.service
    # Containers go on while containerd restarts.
    chroot /host systemctl try-restart containerd.service
}

watch() {
    last=unknown
    while true; do
        if chroot /host /usr/local/bin/sluice node status 2>/dev/null | grep -q '^streaming: on$'; then
            now=true
        else
            now=false
        fi
        if [ "$now" != "$last" ] && set_label "$now"; then
            last=$now
        fi
        sleep 10
    done
}

case "$1" in
install) install ;;
watch) watch ;;
uninstall)
    set_label false
    chroot /host /usr/local/bin/sluice node drain
    chroot /host systemctl disable --now sluice.service
    xtask uninstall --root /host
    chroot /host systemctl daemon-reload
    chroot /host systemctl try-restart containerd.service
    ;;
*)
    echo "usage: node.sh install|watch|uninstall" >&2
    exit 2
    ;;
esac
