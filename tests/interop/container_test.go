package interop

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"
	"k8s.io/cri-client/pkg/logs"
)

// mainScript says a word on each stream, then a line every moment; it ends with 7 when asked to.
const mainScript = `trap 'exit 7' TERM
echo "to stdout: $GREETING from $PWD"
echo "to stderr" >&2
n=0
while :; do n=$((n+1)); echo "tick $n"; sleep 0.2 & wait $!; done`

func (p pod) testContainers(t *testing.T) {
	ctx := context.Background()
	config := shell("main", p.image, mainScript)
	config.Labels = map[string]string{"role": "main"}
	config.Annotations = map[string]string{"example.com/hash": "1f2e\n"}
	config.Envs = []*runtimeapi.KeyValue{{Key: "GREETING", Value: []byte("grüße")}}
	config.WorkingDir = "/tmp"
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 512, OomScoreAdj: 10}

	id := p.create(t, config)
	t.Run("created", func(t *testing.T) {
		status := p.status(t, id)
		equal(t, "state", status.State, runtimeapi.ContainerState_CONTAINER_CREATED)
		equal(t, "started_at", status.StartedAt, 0)
		equal(t, "image_id", status.ImageId, p.image)
		equal(t, "image", status.Image.Image, p.image)
		equal(t, "log_path", status.LogPath, p.logPath("main"))
		equal(t, "name", status.Metadata.Name, "main")
		equal(t, "cpu_shares", status.Resources.GetLinux().GetCpuShares(), 512)
		sameMap(t, "labels", status.Labels, config.Labels)
		sameMap(t, "annotations", status.Annotations, config.Annotations)
		_, _, err := p.runtime.ExecSync(ctx, id, []string{"true"}, 0)
		refused(t, err, codes.FailedPrecondition, "created")
	})
	t.Run("duplicate", func(t *testing.T) {
		_, err := p.runtime.CreateContainer(ctx, p.id, config, p.config)
		refused(t, err, codes.AlreadyExists, "main")
	})
	if err := p.runtime.StartContainer(ctx, id); err != nil {
		t.Fatalf("StartContainer: %v", err)
	}
	t.Run("running", func(t *testing.T) {
		status := p.status(t, id)
		equal(t, "state", status.State, runtimeapi.ContainerState_CONTAINER_RUNNING)
		if status.StartedAt < status.CreatedAt {
			t.Errorf("started at %d, created at %d", status.StartedAt, status.CreatedAt)
		}
		equal(t, "uid", status.GetUser().GetLinux().GetUid(), 0)
		refused(t, p.runtime.StartContainer(ctx, id), codes.FailedPrecondition, "running")
	})
	t.Run("list", func(t *testing.T) { p.testContainerList(t, id) })
	t.Run("exec", func(t *testing.T) { p.testExec(t, id) })
	t.Run("log", func(t *testing.T) { p.testLog(t, id) })
	t.Run("stop", func(t *testing.T) {
		if err := p.runtime.StopContainer(ctx, id, 60); err != nil {
			t.Fatalf("StopContainer: %v", err)
		}
		status := p.status(t, id)
		equal(t, "state", status.State, runtimeapi.ContainerState_CONTAINER_EXITED)
		equal(t, "exit code", status.ExitCode, 7)
		equal(t, "reason", status.Reason, "Error")
		if status.FinishedAt < status.StartedAt {
			t.Errorf("finished at %d, started at %d", status.FinishedAt, status.StartedAt)
		}
		if err := p.runtime.StopContainer(ctx, id, 60); err != nil {
			t.Errorf("StopContainer again: %v", err)
		}
		_, _, err := p.runtime.ExecSync(ctx, id, []string{"true"}, 0)
		refused(t, err, codes.FailedPrecondition, "exited")
		if err := p.runtime.ReopenContainerLog(ctx, id); err == nil {
			t.Error("the log of a stopped container could be reopened")
		}
	})
	t.Run("remove", func(t *testing.T) {
		for range 2 {
			if err := p.runtime.RemoveContainer(ctx, id); err != nil {
				t.Fatalf("RemoveContainer: %v", err)
			}
		}
		_, err := p.runtime.ContainerStatus(ctx, id, false)
		refused(t, err, codes.NotFound)
		if _, err := os.Stat(p.logPath("main")); err != nil {
			t.Errorf("the log is not for the runtime to remove: %v", err)
		}
	})
	t.Run("ends", p.testEnds)
	t.Run("same-name-after-removal", func(t *testing.T) {
		again := p.start(t, shell("main", p.image, "exec sleep 100000"))
		if err := p.runtime.RemoveContainer(ctx, again); err != nil {
			t.Errorf("RemoveContainer of a running one: %v", err)
		}
	})
}

func (p pod) testContainerList(t *testing.T, id string) {
	state := func(state runtimeapi.ContainerState) *runtimeapi.ContainerStateValue {
		return &runtimeapi.ContainerStateValue{State: state}
	}
	running, exited := state(runtimeapi.ContainerState_CONTAINER_RUNNING), state(runtimeapi.ContainerState_CONTAINER_EXITED)
	role := map[string]string{"role": "main"}
	for name, list := range map[string]struct {
		filter *runtimeapi.ContainerFilter
		found  bool
	}{
		"all":            {nil, true},
		"id":             {&runtimeapi.ContainerFilter{Id: id}, true},
		"prefix":         {&runtimeapi.ContainerFilter{Id: id[:13]}, true},
		"other-id":       {&runtimeapi.ContainerFilter{Id: noSuchID}, false},
		"pod":            {&runtimeapi.ContainerFilter{PodSandboxId: p.id}, true},
		"other-pod":      {&runtimeapi.ContainerFilter{PodSandboxId: noSuchID}, false},
		"running":        {&runtimeapi.ContainerFilter{State: running}, true},
		"exited":         {&runtimeapi.ContainerFilter{State: exited}, false},
		"label":          {&runtimeapi.ContainerFilter{LabelSelector: role}, true},
		"wrong-label":    {&runtimeapi.ContainerFilter{LabelSelector: map[string]string{"role": "x"}}, false},
		"all-conditions": {&runtimeapi.ContainerFilter{Id: id, PodSandboxId: p.id, State: running, LabelSelector: role}, true},
	} {
		t.Run(name, func(t *testing.T) {
			items, err := p.runtime.ListContainers(context.Background(), list.filter)
			if err != nil {
				t.Fatal(err)
			}
			index := slices.IndexFunc(items, func(item *runtimeapi.Container) bool { return item.Id == id })
			equal(t, "found", index >= 0, list.found)
			if index >= 0 {
				equal(t, "sandbox", items[index].PodSandboxId, p.id)
				equal(t, "image_id", items[index].ImageId, p.image)
				sameMap(t, "labels", items[index].Labels, role)
			}
		})
	}
}

func (p pod) testExec(t *testing.T, id string) {
	ctx := context.Background()
	for name, exec := range map[string]struct {
		script, stdout, stderr string
		code                   int
	}{
		"stdout":     {"printf hello", "hello", "", 0},
		"both":       {"echo a; echo b >&2", "a\n", "b\n", 0},
		"code":       {"echo gone; exit 42", "gone\n", "", 42},
		"binary":     {`printf '\001\377\n\r\n'`, "\x01\xff\n\r\n", "", 0},
		"no stdin":   {"cat", "", "", 0},
		"killed":     {"kill -9 $$", "", "", 137},
		"hostname":   {"cat /proc/sys/kernel/hostname", p.config.Hostname + "\n", "", 0},
		"sysctl":     {"cat /proc/sys/kernel/shm_rmid_forced", "1\n", "", 0},
		"nameserver": {"grep nameserver /etc/resolv.conf", "nameserver 10.10.10.10\n", "", 0},
		"search":     {"grep search /etc/resolv.conf", "search example.com\n", "", 0},
		"options":    {"grep options /etc/resolv.conf", "options ndots:8\n", "", 0},
		"much":       {"i=0; while [ $i -lt 20000 ]; do echo 0123456789abcdef; i=$((i+1)); done", strings.Repeat("0123456789abcdef\n", 20000), "", 0},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			stdout, stderr, err := p.runtime.ExecSync(ctx, id, []string{"/bin/sh", "-c", exec.script}, time.Minute)
			if string(stdout) != exec.stdout {
				t.Errorf("stdout: %.200q, not %.200q", stdout, exec.stdout)
			}
			equal(t, "stderr", string(stderr), exec.stderr)
			if code := exitCode(err); code != exec.code {
				t.Errorf("exit code %d, not %d: %v", code, exec.code, err)
			}
		})
	}
	t.Run("time-out", func(t *testing.T) {
		_, _, err := p.runtime.ExecSync(ctx, id, []string{"/bin/sh", "-c", "sleep 54321; true"}, time.Second)
		if !errors.Is(err, criclient.ErrCommandTimedOut) {
			t.Fatalf("not a time-out: %v", err)
		}
		script := `for c in /proc/[0-9]*/cmdline; do tr '\0' ' ' <$c; echo; done 2>/dev/null; true`
		eventually(t, "the command's end", func() bool {
			stdout, _, err := p.runtime.ExecSync(ctx, id, []string{"/bin/sh", "-c", script}, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			return len(stdout) > 0 && !bytes.Contains(stdout, []byte("54321"))
		})
	})
	t.Run("not-found", func(t *testing.T) {
		_, _, err := p.runtime.ExecSync(ctx, id, []string{"/no/such/command"}, time.Minute)
		if err == nil || !strings.Contains(err.Error(), "/no/such/command") {
			t.Errorf("%v", err)
		}
	})
	t.Run("empty-command", func(t *testing.T) {
		_, _, err := p.runtime.ExecSync(ctx, id, nil, time.Minute)
		refused(t, err, codes.InvalidArgument, "cmd is empty")
	})
}

// readLog parses a container's log with kubelet's reader.
func (p pod) readLog(t *testing.T, path, id string) (stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	if err := logs.ReadLogs(context.Background(), path, id, &logs.LogOptions{}, p.runtime, &out, &errs); err != nil {
		t.Fatalf("ReadLogs: %v", err)
	}
	return out.String(), errs.String()
}

func (p pod) testLog(t *testing.T, id string) {
	path := p.logPath("main")
	ticks := func(path string) int {
		stdout, _ := p.readLog(t, path, id)
		return strings.Count(stdout, "tick ")
	}
	eventually(t, "the first lines", func() bool { return ticks(path) >= 2 })
	stdout, stderr := p.readLog(t, path, id)
	if !strings.HasPrefix(stdout, "to stdout: grüße from /tmp\ntick 1\ntick 2\n") {
		t.Errorf("stdout: %.200q", stdout)
	}
	equal(t, "stderr", stderr, "to stderr\n")

	rotated := path + ".1"
	if err := os.Rename(path, rotated); err != nil {
		t.Fatal(err)
	}
	if err := p.runtime.ReopenContainerLog(context.Background(), id); err != nil {
		t.Fatalf("ReopenContainerLog: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no new log on return: %v", err)
	}
	before, err := os.ReadFile(rotated)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "lines in the new log", func() bool { return ticks(path) >= 2 })
	after, err := os.ReadFile(rotated)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "length of the old log", len(after), len(before))
	// Nothing is lost and nothing is said twice where the old log ends and the new one begins.
	old, _ := p.readLog(t, rotated, id)
	recent, _ := p.readLog(t, path, id)
	all := strings.Fields(strings.ReplaceAll(old+recent, "tick ", ""))
	for i, number := range all[slices.Index(all, "1"):] {
		if number != strconv.Itoa(i+1) {
			t.Fatalf("%s comes where %d should; the old log ends in %.40q", number, i+1, old[max(0, len(old)-40):])
		}
	}
}

// testEnds: how containers end, and what is said of it.
func (p pod) testEnds(t *testing.T) {
	ctx := context.Background()
	for name, end := range map[string]struct {
		script string
		code   int32
		reason string
		stdout string
	}{
		"completed":  {"echo done", 0, "Completed", "done\n"},
		"error":      {"echo failed; exit 3", 3, "Error", "failed\n"},
		"by-signal":  {"kill -9 $$", 137, "Error", ""},
		"no-newline": {"printf unfinished", 0, "Completed", "unfinished"},
		"long-line":  {"i=0; while [ $i -lt 4000 ]; do printf 0123456789; i=$((i+1)); done; echo", 0, "Completed", strings.Repeat("0123456789", 4000) + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			id := p.start(t, shell(name, p.image, end.script))
			status := p.exited(t, id)
			equal(t, "exit code", status.ExitCode, end.code)
			equal(t, "reason", status.Reason, end.reason)
			// The log is whole when the end is told: kubelet reads the last lines of it then.
			stdout, _ := p.readLog(t, p.logPath(name), id)
			if stdout != end.stdout {
				t.Errorf("log: %d octets %.80q, not %d octets %.80q", len(stdout), stdout, len(end.stdout), end.stdout)
			}
			if err := p.runtime.RemoveContainer(ctx, id); err != nil {
				t.Errorf("RemoveContainer: %v", err)
			}
		})
	}
	t.Run("killed-after-grace", func(t *testing.T) {
		id := p.start(t, shell("deaf", p.image, "trap '' TERM; echo deaf; while :; do sleep 1; done"))
		eventually(t, "its deafness", func() bool {
			stdout, _ := p.readLog(t, p.logPath("deaf"), id)
			return stdout == "deaf\n"
		})
		if err := p.runtime.StopContainer(ctx, id, 1); err != nil {
			t.Fatalf("StopContainer: %v", err)
		}
		equal(t, "exit code", p.status(t, id).ExitCode, 137)
	})
	t.Run("stop-before-start", func(t *testing.T) {
		id := p.create(t, shell("never", p.image, "true"))
		if err := p.runtime.StopContainer(ctx, id, 1); err != nil {
			t.Errorf("StopContainer: %v", err)
		}
		if err := p.runtime.RemoveContainer(ctx, id); err != nil {
			t.Errorf("RemoveContainer: %v", err)
		}
	})
}

// testBadContainers: each is refused for its reason, and nothing of it is left.
func (p pod) testBadContainers(t *testing.T) {
	ctx := context.Background()
	for name, bad := range map[string]struct {
		change func(*runtimeapi.ContainerConfig)
		code   codes.Code
		text   string
	}{
		"no-metadata": {func(c *runtimeapi.ContainerConfig) { c.Metadata = nil }, codes.InvalidArgument, "config.metadata is missing"},
		"empty-name":  {func(c *runtimeapi.ContainerConfig) { c.Metadata.Name = "" }, codes.InvalidArgument, "config.metadata.name is empty"},
		"no-image":    {func(c *runtimeapi.ContainerConfig) { c.Image = nil }, codes.InvalidArgument, "config.image.image is empty"},
		"absent-image": {func(c *runtimeapi.ContainerConfig) {
			c.Image.Image = "localhost/no/such:image"
		}, codes.NotFound, "localhost/no/such:image"},
		"log-outside": {func(c *runtimeapi.ContainerConfig) { c.LogPath = "../escaped.log" }, codes.InvalidArgument, "config.log_path"},
		"relative-working-directory": {func(c *runtimeapi.ContainerConfig) {
			c.WorkingDir = "tmp"
		}, codes.InvalidArgument, "config.working_dir"},
		"bidirectional-mount": {func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{
				ContainerPath: "/m", HostPath: "/tmp", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL,
			}}
		}, codes.InvalidArgument, "config.mounts[0].propagation"},
		"privileged-in-unprivileged-pod": {func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true}
		}, codes.InvalidArgument, "privileged"},
		"group-without-user": {func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{RunAsGroup: &runtimeapi.Int64Value{Value: 5}}
		}, codes.InvalidArgument, "run_as_group is set without"},
	} {
		t.Run(name, func(t *testing.T) {
			config := shell("bad", p.image, "true")
			config.Labels = map[string]string{"bad": name}
			bad.change(config)
			_, err := p.runtime.CreateContainer(ctx, p.id, config, p.config)
			refused(t, err, bad.code, bad.text)
			p.nothingLeft(t, name)
		})
	}
	for name, bad := range map[string]struct {
		change func(*runtimeapi.ContainerConfig)
		text   string
	}{
		"command-not-found": {func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/no/such/command"} }, "/no/such/command"},
		"unknown-user": {func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{RunAsUsername: "nosuchuser"}
		}, "nosuchuser"},
	} {
		t.Run(name, func(t *testing.T) {
			config := shell("bad", p.image, "true")
			config.Labels = map[string]string{"bad": name}
			bad.change(config)
			// Whether the guest finds out at creation or at the start is the OCI runtime's affair.
			id, err := p.runtime.CreateContainer(ctx, p.id, config, p.config)
			if err == nil {
				err = p.runtime.StartContainer(ctx, id)
				status := p.status(t, id)
				equal(t, "state", status.State, runtimeapi.ContainerState_CONTAINER_EXITED)
				if status.ExitCode == 0 {
					t.Error("a container that could not be started exited with 0")
				}
				if err := p.runtime.RemoveContainer(ctx, id); err != nil {
					t.Errorf("RemoveContainer: %v", err)
				}
			}
			if err == nil || !strings.Contains(err.Error(), bad.text) {
				t.Errorf("error: %v", err)
			}
			p.nothingLeft(t, name)
		})
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(p.config.LogDirectory), "escaped.log")); err == nil {
		t.Error("a log was made outside the log directory")
	}
}

func (p pod) nothingLeft(t *testing.T, name string) {
	t.Helper()
	filter := &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"bad": name}}
	if items, err := p.runtime.ListContainers(context.Background(), filter); err != nil || len(items) != 0 {
		t.Errorf("left behind: %v, %v", items, err)
	}
}
