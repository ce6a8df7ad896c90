#!/bin/sh
# Runs a command that trains, once, and ends with its exit code; or with 4 where starting it again
# is in vain: it has ended four times without a new checkpoint in between.
#
#     sh launch/attempt.sh WORKDIR COMMAND [ARGUMENT...]
#
# Codes that starting again cannot cure (0, 2, 3; docs/scale_out.md) are never counted.  Of an
# indexed Kubernetes job the first pod counts for all.
workdir=$1
shift

child='' stopped=''
trap 'stopped=1; [ -z "$child" ] || kill -TERM $child' TERM INT # before there is a command to stop
"$@" &
child=$!
[ -z "$stopped" ] || kill -TERM $child
wait $child
code=$?
while kill -0 $child 2>/dev/null; do # a signal has ended the wait, and not yet the command
    wait $child
    code=$?
done

case $code in
    0 | 2 | 3) exit $code ;;
esac
[ "${JOB_COMPLETION_INDEX:-0}" = 0 ] || exit $code
[ -d "$workdir" ] || exit $code

newest=$(ls "$workdir/checkpoints" 2>/dev/null | grep -x '[0-9]*' | sort -n | tail -n 1)
newest=${newest:-none}
counted=none attempts=0
[ -f "$workdir/attempts" ] && read -r counted attempts < "$workdir/attempts"
case $counted:$attempts in
    "$newest":[0-9]) ;;
    *) attempts=0 ;;
esac
attempts=$((attempts + 1))
rm -f "$workdir/attempts"
echo "$newest $attempts" > "$workdir/attempts"
if [ "$attempts" -ge 4 ]; then
    rm "$workdir/attempts" # who starts it by hand gets as many attempts again
    echo "gave up: ended $attempts times after checkpoint $newest, the last time with $code" >&2
    exit 4
fi
exit $code
