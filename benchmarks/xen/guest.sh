#!/pvirq/busybox sh
# guest NAME COMMAND: in domain 0, run a shell command in a guest whose initrd has pvirq's agent, and print what it
# prints; its exit status. The first one waits for the agent.
tty=$(xenstore-read "/local/domain/$(xl domid "$1")/console/tty") || exit 125
nonce=n$$
exec 3<> "$tty"
stty raw -echo <&3
if [ ! -e "/run/ready-$1" ]; then
	awk '/\036pvirq ready/ { exit }' <&3
	: > "/run/ready-$1"
fi
printf '%s %s\n' "$nonce" "$(printf %s "$2" | base64 -w 0)" >&3
# Lines end with \r\n where the guest's terminal adds the \r.
exec awk -v nonce="$nonce" '
	{ sub(/\r$/, "") }
	(at = index($0, "\036" nonce " end ")) {
		if (at > 1) print substr($0, 1, at - 1)
		exit substr($0, at + length(nonce) + 6) + 0
	}
	begun { print }
	$0 == "\036" nonce " begin" { begun = 1 }
' <&3
