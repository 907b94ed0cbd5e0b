package interop

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestRuntime(t *testing.T) {
	d := connect(t)
	ctx := context.Background()
	version, err := d.runtime.Version(ctx, "0.1.0")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "version", version.Version, "0.1.0")
	equal(t, "runtime name", version.RuntimeName, "vmrt")
	equal(t, "API version", version.RuntimeApiVersion, "v1")
	if strings.Count(version.RuntimeVersion, ".") != 2 {
		t.Errorf("runtime version %q is not semantic", version.RuntimeVersion)
	}

	status, err := d.runtime.Status(ctx, true)
	if err != nil {
		t.Fatal(err)
	}
	conditions := map[string]bool{}
	for _, condition := range status.Status.Conditions {
		conditions[condition.Type] = condition.Status
		if !condition.Status {
			t.Errorf("%s is false: %s: %s", condition.Type, condition.Reason, condition.Message)
		}
	}
	if !conditions[runtimeapi.RuntimeReady] || !conditions[runtimeapi.NetworkReady] {
		t.Errorf("conditions: %v", conditions)
	}
	handlers := map[string]bool{}
	for _, handler := range status.RuntimeHandlers {
		handlers[handler.Name] = true
	}
	if !handlers[""] || len(handlers) < 2 {
		t.Errorf("handlers: %v", handlers)
	}
	if status.Info["config"] == "" {
		t.Error("verbose status has no config")
	}

	config, err := d.runtime.RuntimeConfig(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if config.Linux == nil {
		t.Error("RuntimeConfig says no cgroup driver")
	}
	network := &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "10.88.0.0/16"}}
	if err := d.runtime.UpdateRuntimeConfig(ctx, network); err != nil {
		t.Errorf("UpdateRuntimeConfig: %v", err)
	}
}

// TestUnknownIDs: what is to be gone is gone already, everything else is NotFound.
func TestUnknownIDs(t *testing.T) {
	d := connect(t)
	ctx := context.Background()
	for name, call := range map[string]func() error{
		"StopPodSandbox":   func() error { return d.runtime.StopPodSandbox(ctx, noSuchID) },
		"RemovePodSandbox": func() error { return d.runtime.RemovePodSandbox(ctx, noSuchID) },
		"StopContainer":    func() error { return d.runtime.StopContainer(ctx, noSuchID, 0) },
		"RemoveContainer":  func() error { return d.runtime.RemoveContainer(ctx, noSuchID) },
	} {
		if err := call(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, call := range map[string]func() error{
		"PodSandboxStatus": func() error {
			_, err := d.runtime.PodSandboxStatus(ctx, noSuchID, false)
			return err
		},
		"CreateContainer": func() error {
			_, err := d.runtime.CreateContainer(ctx, noSuchID, shell("x", "x", "x"), sandboxConfig(t, "unknown"))
			return err
		},
		"StartContainer": func() error { return d.runtime.StartContainer(ctx, noSuchID) },
		"ContainerStatus": func() error {
			_, err := d.runtime.ContainerStatus(ctx, noSuchID, false)
			return err
		},
		"ExecSync": func() error {
			_, _, err := d.runtime.ExecSync(ctx, noSuchID, []string{"true"}, 0)
			return err
		},
		"ReopenContainerLog": func() error { return d.runtime.ReopenContainerLog(ctx, noSuchID) },
	} {
		t.Run(name, func(t *testing.T) { refused(t, call(), codes.NotFound, noSuchID) })
	}
}

// TestBadSandboxes: each is refused for its reason, and nothing of it is left.
func TestBadSandboxes(t *testing.T) {
	d := connect(t)
	ctx := context.Background()
	for name, bad := range map[string]struct {
		change  func(*runtimeapi.PodSandboxConfig)
		handler string
		text    string
	}{
		"no metadata":     {func(c *runtimeapi.PodSandboxConfig) { c.Metadata = nil }, "", "config.metadata is missing"},
		"empty name":      {func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "" }, "", "config.metadata.name is empty"},
		"empty namespace": {func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Namespace = "" }, "", "namespace is empty"},
		"empty uid":       {func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Uid = "" }, "", "config.metadata.uid is empty"},
		"unknown handler": {func(*runtimeapi.PodSandboxConfig) {}, "no-such-handler", "no-such-handler"},
		"bad sysctl": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"../../etc/passwd": "1"}
		}, "", "config.linux.sysctls"},
		"host network": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE},
			}
		}, "", "hostNetwork"},
		"group without user": {func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{
				RunAsGroup: &runtimeapi.Int64Value{Value: 1000},
			}
		}, "", "run_as_group is set without run_as_user"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			config := sandboxConfig(t, "bad")
			labels := config.Labels
			bad.change(config)
			id, err := d.runtime.RunPodSandbox(ctx, config, bad.handler)
			refused(t, err, codes.InvalidArgument, bad.text)
			if id != "" {
				t.Errorf("id %s came with the error", id)
			}
			items, err := d.runtime.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{LabelSelector: labels})
			if err != nil || len(items) != 0 {
				t.Errorf("left behind: %v, %v", items, err)
			}
		})
	}
}

// TestPod takes one pod through its life; containers that run in it are tested on the way.
func TestPod(t *testing.T) {
	d := connect(t)
	ctx := context.Background()
	image := d.testImage(t)
	config := sandboxConfig(t, "life")
	config.DnsConfig = &runtimeapi.DNSConfig{
		Servers: []string{"10.10.10.10"}, Searches: []string{"example.com"}, Options: []string{"ndots:8"},
	}
	config.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"}
	p := pod{d, d.runPod(t, config), config, image}

	t.Run("status", p.testStatus)
	t.Run("list", p.testList)
	t.Run("duplicate", func(t *testing.T) {
		_, err := d.runtime.RunPodSandbox(ctx, config, "")
		refused(t, err, codes.AlreadyExists, config.Metadata.Name)
	})
	t.Run("containers", p.testContainers)
	t.Run("bad-containers", p.testBadContainers)
	t.Run("kubelet", p.testKubelet)

	left := p.start(t, shell("left", image, "exec sleep 100000"))
	if err := d.runtime.StopPodSandbox(ctx, p.id); err != nil {
		t.Fatalf("StopPodSandbox: %v", err)
	}
	t.Run("stopped", func(t *testing.T) {
		response, err := d.runtime.PodSandboxStatus(ctx, p.id, false)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "state", response.Status.State, runtimeapi.PodSandboxState_SANDBOX_NOTREADY)
		equal(t, "state of its container", p.status(t, left).State, runtimeapi.ContainerState_CONTAINER_EXITED)
		if p.status(t, left).FinishedAt == 0 {
			t.Error("its container has no end")
		}
		if err := d.runtime.StopPodSandbox(ctx, p.id); err != nil {
			t.Errorf("StopPodSandbox again: %v", err)
		}
		_, err = d.runtime.CreateContainer(ctx, p.id, shell("late", image, "true"), config)
		refused(t, err, codes.FailedPrecondition)
		_, _, err = d.runtime.ExecSync(ctx, left, []string{"true"}, 0)
		refused(t, err, codes.FailedPrecondition)
	})
	t.Run("removed", func(t *testing.T) {
		for range 2 {
			if err := d.runtime.RemovePodSandbox(ctx, p.id); err != nil {
				t.Fatalf("RemovePodSandbox: %v", err)
			}
		}
		_, err := d.runtime.PodSandboxStatus(ctx, p.id, false)
		refused(t, err, codes.NotFound)
		_, err = d.runtime.ContainerStatus(ctx, left, false)
		refused(t, err, codes.NotFound)
		items, err := d.runtime.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{Id: p.id})
		if err != nil || len(items) != 0 {
			t.Errorf("still listed: %v, %v", items, err)
		}
	})
}

func (p pod) testStatus(t *testing.T) {
	response, err := p.runtime.PodSandboxStatus(context.Background(), p.id, true)
	if err != nil {
		t.Fatal(err)
	}
	status := response.Status
	equal(t, "id", status.Id, p.id)
	equal(t, "state", status.State, runtimeapi.PodSandboxState_SANDBOX_READY)
	if !proto.Equal(status.Metadata, p.config.Metadata) {
		t.Errorf("metadata: %v", status.Metadata)
	}
	sameMap(t, "labels", status.Labels, p.config.Labels)
	sameMap(t, "annotations", status.Annotations, p.config.Annotations)
	if status.CreatedAt < 1_500_000_000_000_000_000 {
		t.Errorf("created_at %d is not in nanoseconds", status.CreatedAt)
	}
	if address, err := netip.ParseAddr(status.GetNetwork().GetIp()); err != nil || address.IsLoopback() {
		t.Errorf("IP: %q, %v", status.GetNetwork().GetIp(), err)
	}
	equal(t, "network mode", status.Linux.Namespaces.Options.Network, runtimeapi.NamespaceMode_POD)
	if len(response.Info) == 0 {
		t.Error("verbose status has no info")
	}
}

func (p pod) testList(t *testing.T) {
	ready := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}
	notReady := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}
	for name, list := range map[string]struct {
		filter *runtimeapi.PodSandboxFilter
		found  bool
	}{
		"all":           {nil, true},
		"id":            {&runtimeapi.PodSandboxFilter{Id: p.id}, true},
		"prefix":        {&runtimeapi.PodSandboxFilter{Id: p.id[:13]}, true},
		"other id":      {&runtimeapi.PodSandboxFilter{Id: noSuchID}, false},
		"ready":         {&runtimeapi.PodSandboxFilter{State: ready}, true},
		"not ready":     {&runtimeapi.PodSandboxFilter{State: notReady}, false},
		"labels":        {&runtimeapi.PodSandboxFilter{LabelSelector: p.config.Labels}, true},
		"wrong label":   {&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "other"}}, false},
		"id and labels": {&runtimeapi.PodSandboxFilter{Id: p.id, LabelSelector: p.config.Labels, State: ready}, true},
		"id, not ready": {&runtimeapi.PodSandboxFilter{Id: p.id, State: notReady}, false},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			items, err := p.runtime.ListPodSandbox(context.Background(), list.filter)
			if err != nil {
				t.Fatal(err)
			}
			var found *runtimeapi.PodSandbox
			for _, item := range items {
				if item.Id == p.id {
					found = item
				}
			}
			equal(t, "found", found != nil, list.found)
			if found != nil {
				sameMap(t, "annotations", found.Annotations, p.config.Annotations)
				equal(t, "name", found.Metadata.Name, p.config.Metadata.Name)
			}
		})
	}
}

func sameMap(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s are %v, not %v", what, got, want)
	}
}

// exitCode returns the code that a failed ExecSync reports; 0 for none, -1 for another kind of error.
func exitCode(err error) int {
	var exit interface{ ExitStatus() int }
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitStatus()
	default:
		return -1
	}
}
