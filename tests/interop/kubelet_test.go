package interop

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testKubelet has what kubelet relies on beyond the calls' plain meaning, as a table; docs/cri.md names its rows.
func (p pod) testKubelet(t *testing.T) {
	for _, row := range []struct {
		name string
		test func(*testing.T)
	}{
		{"message-and-log-before-the-exit", p.testMessageBeforeExit},
		{"debug-container-in-the-target-namespace", p.testDebugContainer},
		{"stops-at-the-same-time", p.testStopsAtTheSameTime},
		{"cancelled-stop", p.testCancelledStop},
		{"own-etc-hosts", p.testOwnHosts},
		{"image-volume", p.testImageVolume},
		{"stats", p.testStats},
		{"metrics", p.testMetrics},
		{"events", p.testEvents},
		{"resize", p.testResize},
		{"checkpoint", func(t *testing.T) {
			err := p.runtime.CheckpointContainer(context.Background(), &runtimeapi.CheckpointContainerRequest{ContainerId: noSuchID})
			refused(t, err, codes.Unimplemented)
		}},
	} {
		t.Run(row.name, row.test)
	}
}

// testMessageBeforeExit is kubelet's termination message: a host file mounted into the container, read when it is EXITED.
func (p pod) testMessageBeforeExit(t *testing.T) {
	message := filepath.Join(t.TempDir(), "message")
	if err := os.WriteFile(message, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	config := shell("message", p.image, `echo last words; echo "it broke" > /dev/termination-log; exit 3`)
	config.Mounts = []*runtimeapi.Mount{{HostPath: message, ContainerPath: "/dev/termination-log"}}
	id := p.start(t, config)
	status := p.exited(t, id)
	equal(t, "exit code", status.ExitCode, 3)
	equal(t, "reason", status.Reason, "Error")
	// At once: nothing is waited for any more.
	index := slices.IndexFunc(status.Mounts, func(m *runtimeapi.Mount) bool { return m.ContainerPath == "/dev/termination-log" })
	if index < 0 || len(status.Mounts) != 1 {
		t.Fatalf("mounts: %v", status.Mounts)
	}
	text, err := os.ReadFile(status.Mounts[index].HostPath)
	if err != nil || string(text) != "it broke\n" {
		t.Errorf("the message is %q, %v", text, err)
	}
	stdout, _ := p.readLog(t, status.LogPath, id)
	equal(t, "log", stdout, "last words\n")
}

// testDebugContainer is kubectl debug: a container that comes late and has another one's PID namespace.
func (p pod) testDebugContainer(t *testing.T) {
	ctx := context.Background()
	target := shell("target", p.image, "exec sleep 98765")
	target.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
	}
	id := p.start(t, target)
	debug := shell("debug", p.image, "exec sleep 100000")
	options := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: id}
	debug.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: options}
	seen, _, err := p.runtime.ExecSync(ctx, p.start(t, debug), []string{"cat", "/proc/1/cmdline"}, 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "PID 1", strings.ReplaceAll(string(seen), "\x00", " "), "sleep 98765 ")
	options.TargetId = noSuchID
	debug.Metadata.Name = "lost"
	if _, err := p.runtime.CreateContainer(ctx, p.id, debug, p.config); err == nil {
		t.Error("a target that is not there was taken")
	}
}

// stubborn ignores its stop signal.
func (p pod) stubborn(t *testing.T, name string) string {
	t.Helper()
	id := p.start(t, shell(name, p.image, `trap "" TERM; echo ready; while :; do sleep 1; done`))
	eventually(t, "the trap", func() bool {
		stdout, _ := p.readLog(t, p.logPath(name), id)
		return stdout == "ready\n"
	})
	return id
}

// testStopsAtTheSameTime: kubelet may call again with less patience, and need not wait for the first call.
func (p pod) testStopsAtTheSameTime(t *testing.T) {
	ctx := context.Background()
	id := p.stubborn(t, "stubborn")
	first := make(chan error)
	go func() { first <- p.runtime.StopContainer(ctx, id, 1000) }()
	if err := p.runtime.StopContainer(ctx, id, 1); err != nil {
		t.Errorf("the second stop: %v", err)
	}
	if err := <-first; err != nil {
		t.Errorf("the first stop: %v", err)
	}
	equal(t, "exit code", p.status(t, id).ExitCode, 137)
}

// testCancelledStop: a stop whose client goes away kills nobody before the time it gave.
func (p pod) testCancelledStop(t *testing.T) {
	id := p.stubborn(t, "spared")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- p.runtime.StopContainer(ctx, id, 1000) }()
	time.Sleep(200 * time.Millisecond)
	cancel()
	if err := <-ended; err == nil {
		t.Error("a cancelled stop succeeded")
	}
	equal(t, "state", p.status(t, id).State, runtimeapi.ContainerState_CONTAINER_RUNNING)
	if err := p.runtime.RemoveContainer(context.Background(), id); err != nil {
		t.Error(err)
	}
}

// testOwnHosts: kubelet brings /etc/hosts itself; resolv.conf and hostname stay the runtime's, in no status.
func (p pod) testOwnHosts(t *testing.T) {
	ctx := context.Background()
	hosts := filepath.Join(t.TempDir(), "etc-hosts")
	if err := os.WriteFile(hosts, []byte("10.1.2.3 kubelet-managed\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	config := shell("hosts", p.image, "exec sleep 100000")
	config.Mounts = []*runtimeapi.Mount{{HostPath: hosts, ContainerPath: "/etc/hosts", SelinuxRelabel: true}}
	id := p.start(t, config)
	out, _, err := p.runtime.ExecSync(ctx, id, []string{"sh", "-c", "cat /etc/hosts /etc/hostname; grep nameserver /etc/resolv.conf"}, 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "files", string(out), "10.1.2.3 kubelet-managed\n"+p.config.Hostname+"\nnameserver 10.10.10.10\n")
	equal(t, "mounts", len(p.status(t, id).Mounts), 1)
	plain := p.start(t, shell("plain", p.image, "exec sleep 100000"))
	out, _, err = p.runtime.ExecSync(ctx, plain, []string{"grep", "-c", p.config.Hostname, "/etc/hosts"}, 60*time.Second)
	if err != nil {
		t.Errorf("no hosts file without one of kubelet's: %v, %s", err, out)
	}
	equal(t, "mounts of none", len(p.status(t, plain).Mounts), 0)
}

func (p pod) testImageVolume(t *testing.T) {
	ctx := context.Background()
	config := shell("volume", p.image, "cat /v/passwd; touch /v/x")
	config.Mounts = []*runtimeapi.Mount{{
		ContainerPath: "/v", Readonly: true, ImageSubPath: "etc",
		Image: &runtimeapi.ImageSpec{Image: p.image, UserSpecifiedImage: "the-pods-words"},
	}}
	id := p.create(t, config)
	mount := p.status(t, id).Mounts[0]
	equal(t, "image_ref", mount.Image.GetImageRef(), p.image)
	equal(t, "user_specified_image", mount.Image.GetUserSpecifiedImage(), "the-pods-words")
	equal(t, "image_sub_path", mount.ImageSubPath, "etc")
	if err := p.runtime.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	stdout, stderr := p.readLog(t, p.exited(t, id).LogPath, id)
	if !strings.HasPrefix(stdout, "root:") || !strings.Contains(stderr, "Read-only file system") {
		t.Errorf("stdout %q, stderr %q", stdout, stderr)
	}
	config.Metadata.Name = "no-path"
	config.Mounts[0].ImageSubPath = "no/such/path"
	_, err := p.runtime.CreateContainer(ctx, p.id, config, p.config)
	// kubelet looks for its word at the beginning of the status's message.
	if !strings.HasPrefix(status.Convert(err).Message(), "ImageVolumeMountFailed: ") {
		t.Errorf("%v", err)
	}
}

// testStats: kubelet merges them into its summary; right after a start there is already something to merge.
func (p pod) testStats(t *testing.T) {
	ctx := context.Background()
	config := shell("busy", p.image, "echo some data > /data; exec sleep 100000")
	config.Labels = map[string]string{"stats": "busy"}
	id := p.start(t, config)
	one, err := p.runtime.ContainerStats(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if one.Cpu.GetTimestamp() == 0 || one.Memory.GetTimestamp() == 0 || one.Memory.GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("%v", one)
	}
	equal(t, "name", one.Attributes.Metadata.Name, "busy")
	for name, list := range map[string]struct {
		filter *runtimeapi.ContainerStatsFilter
		found  bool
	}{
		"all":       {nil, true},
		"id":        {&runtimeapi.ContainerStatsFilter{Id: id}, true},
		"pod":       {&runtimeapi.ContainerStatsFilter{PodSandboxId: p.id}, true},
		"other-pod": {&runtimeapi.ContainerStatsFilter{PodSandboxId: noSuchID}, false},
		"label":     {&runtimeapi.ContainerStatsFilter{LabelSelector: config.Labels}, true},
		"both":      {&runtimeapi.ContainerStatsFilter{Id: id, LabelSelector: map[string]string{"stats": "idle"}}, false},
	} {
		stats, err := p.runtime.ListContainerStats(ctx, list.filter)
		if err != nil {
			t.Fatal(err)
		}
		found := slices.ContainsFunc(stats, func(s *runtimeapi.ContainerStats) bool { return s.Attributes.Id == id })
		equal(t, name, found, list.found)
	}
	pod, err := p.runtime.PodSandboxStats(ctx, p.id)
	if err != nil {
		t.Fatal(err)
	}
	if pod.Linux.Network.GetDefaultInterface().GetName() == "" || pod.Linux.Process.GetProcessCount().GetValue() == 0 {
		t.Errorf("%v", pod.Linux)
	}
	if !slices.ContainsFunc(pod.Linux.Containers, func(s *runtimeapi.ContainerStats) bool { return s.Attributes.Id == id }) {
		t.Error("the pod's statistics lack its container")
	}
}

func (p pod) testMetrics(t *testing.T) {
	ctx := context.Background()
	descriptors, err := p.runtime.ListMetricDescriptors(ctx)
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]int{}
	for _, descriptor := range descriptors {
		labels[descriptor.Name] = len(descriptor.LabelKeys)
	}
	pods, err := p.runtime.ListPodSandboxMetrics(ctx)
	if err != nil {
		t.Fatal(err)
	}
	index := slices.IndexFunc(pods, func(m *runtimeapi.PodSandboxMetrics) bool { return m.PodSandboxId == p.id })
	if index < 0 {
		t.Fatal("no metrics of the pod")
	}
	metrics := pods[index].Metrics
	for _, container := range pods[index].ContainerMetrics {
		metrics = append(metrics, container.Metrics...)
	}
	valued := map[string]bool{}
	for _, metric := range metrics {
		valued[metric.Name] = true
		count, described := labels[metric.Name]
		if !described || count != len(metric.LabelValues) {
			t.Errorf("%s: %d label values, described: %v with %d", metric.Name, len(metric.LabelValues), described, count)
		}
	}
	if len(labels) < 45 || len(valued) < 40 {
		t.Errorf("%d descriptors, %d of them with values", len(labels), len(valued))
	}
}

// testEvents: two clients at the same time hear a container's whole life in its order, with the pod's picture.
func (p pod) testEvents(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var channels [2]chan *runtimeapi.ContainerEventResponse
	ready := make(chan struct{}, len(channels))
	for i := range channels {
		channels[i] = make(chan *runtimeapi.ContainerEventResponse, 1000)
		go func() {
			_ = p.runtime.GetContainerEvents(ctx, channels[i], func(runtimeapi.RuntimeService_GetContainerEventsClient) { ready <- struct{}{} })
		}()
	}
	for range channels {
		<-ready
	}
	// The call is made; that the daemon has it is seen by an event.
	for _, channel := range channels {
		eventually(t, "a first event", func() bool {
			id := p.create(t, shell("probe", p.image, "true"))
			if err := p.runtime.RemoveContainer(ctx, id); err != nil {
				t.Fatal(err)
			}
			return len(channel) > 0
		})
	}
	id := p.start(t, shell("heard", p.image, "exit 4"))
	p.exited(t, id)
	if err := p.runtime.RemoveContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	for _, channel := range channels {
		var kinds []runtimeapi.ContainerEventType
		for len(kinds) == 0 || kinds[len(kinds)-1] != runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT {
			select {
			case event := <-channel:
				if event.ContainerId != id {
					continue
				}
				kinds = append(kinds, event.ContainerEventType)
				if event.PodSandboxStatus.GetMetadata().GetUid() != p.config.Metadata.Uid || event.CreatedAt == 0 {
					t.Errorf("%v", event)
				}
				if event.ContainerEventType == runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT {
					index := slices.IndexFunc(event.ContainersStatuses, func(s *runtimeapi.ContainerStatus) bool { return s.Id == id })
					if index < 0 || event.ContainersStatuses[index].ExitCode != 4 {
						t.Errorf("its end is not in the picture: %v", event.ContainersStatuses)
					}
				}
			case <-time.After(time.Minute):
				t.Fatalf("heard %v only", kinds)
			}
		}
		if !slices.Equal(kinds, []runtimeapi.ContainerEventType{
			runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT,
			runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
		}) {
			t.Errorf("heard %v", kinds)
		}
	}
}

// testResize: kubelet compares ContainerStatus.resources with what it asked for; until they agree it is "InProgress".
func (p pod) testResize(t *testing.T) {
	ctx := context.Background()
	config := shell("resized", p.image, "exec sleep 100000")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 7}
	id := p.start(t, config)
	update := func(linux *runtimeapi.LinuxContainerResources) error {
		return p.runtime.UpdateContainerResources(ctx, id, &runtimeapi.ContainerResources{Linux: linux})
	}
	told := func() *runtimeapi.LinuxContainerResources { return p.status(t, id).Resources.GetLinux() }
	if err := update(&runtimeapi.LinuxContainerResources{CpuShares: 1024}); err != nil {
		t.Fatal(err)
	}
	equal(t, "cpu_shares", told().CpuShares, 1024)
	equal(t, "memory, not set in the change", told().MemoryLimitInBytes, 64<<20)
	if err := update(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 50}); err == nil {
		t.Error("more memory than any VM has was taken")
	}
	equal(t, "memory after a refusal", told().MemoryLimitInBytes, 64<<20)
	if err := p.runtime.RemoveContainer(ctx, id); err != nil {
		t.Error(err)
	}
}
