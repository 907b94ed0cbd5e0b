package interop

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"
	"k8s.io/klog/v2"
)

// requestTimeout is kubelet's runtimeRequestTimeout, and half as much again for machines without KVM.
const requestTimeout = 3 * time.Minute

// noSuchID has the shape of an id and is nobody's.
const noSuchID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// TestMain silences the client library: it logs every error, and most of those here are wanted.
func TestMain(m *testing.M) {
	klog.SetLogger(klog.Logger{})
	os.Exit(m.Run())
}

// daemon is one connection to vmrt, with both services, as kubelet makes it.
type daemon struct {
	runtime internalapi.RuntimeService
	images  internalapi.ImageManagerService
}

func needed(t *testing.T, variable string) string {
	t.Helper()
	value := os.Getenv(variable)
	if value == "" {
		if os.Getenv("CI") == "true" && os.Getenv("VMRT_INTEROP") == "1" {
			t.Fatalf("%s is not set, and CI=true with VMRT_INTEROP=1 does not let this test be skipped", variable)
		}
		t.Skipf("%s is not set", variable)
	}
	return value
}

func connect(t *testing.T) daemon {
	t.Helper()
	endpoint := "unix://" + needed(t, "VMRT_SOCKET")
	ctx := context.Background()
	runtime, err := criclient.NewRemoteRuntimeService(ctx, endpoint, requestTimeout, nil, false)
	if err != nil {
		t.Fatalf("connect to the runtime service: %v", err)
	}
	t.Cleanup(func() { _ = runtime.Close(ctx) })
	images, err := criclient.NewRemoteImageService(ctx, endpoint, requestTimeout, nil, false)
	if err != nil {
		t.Fatalf("connect to the image service: %v", err)
	}
	t.Cleanup(func() { _ = images.Close(ctx) })
	return daemon{runtime, images}
}

// testImage returns the id of the image that containers are made from, pulling it where it is absent.
func (d daemon) testImage(t *testing.T) string {
	t.Helper()
	ctx := context.Background()
	spec := &runtimeapi.ImageSpec{Image: needed(t, "VMRT_TEST_IMAGE")}
	response, err := d.images.ImageStatus(ctx, spec, false)
	if err != nil {
		t.Fatalf("ImageStatus(%s): %v", spec.Image, err)
	}
	if response.GetImage() != nil {
		return response.Image.Id
	}
	id, err := d.images.PullImage(ctx, spec, nil, nil)
	if err != nil {
		t.Fatalf("PullImage(%s): %v", spec.Image, err)
	}
	return id
}

// sandboxConfig describes a pod whose name no other test and no other run of this test uses.
func sandboxConfig(t *testing.T, name string) *runtimeapi.PodSandboxConfig {
	t.Helper()
	unique := fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano())
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "interop", Uid: unique, Attempt: 1},
		Hostname:     name,
		LogDirectory: t.TempDir(),
		Labels:       map[string]string{"run": unique, "app": name},
		Annotations:  map[string]string{"example.com/note": "two\nlines, \"quoted\" and ünïcode"},
		Linux:        &runtimeapi.LinuxPodSandboxConfig{},
	}
}

// runPod starts a pod and removes it at the end of the test.
func (d daemon) runPod(t *testing.T, config *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	id, err := d.runtime.RunPodSandbox(context.Background(), config, "")
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}
	t.Cleanup(func() {
		if err := d.runtime.StopPodSandbox(context.Background(), id); err != nil {
			t.Errorf("StopPodSandbox: %v", err)
		}
		if err := d.runtime.RemovePodSandbox(context.Background(), id); err != nil {
			t.Errorf("RemovePodSandbox: %v", err)
		}
	})
	return id
}

// shell describes a container that runs a script.
func shell(name, image, script string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name, Attempt: 1},
		Image:    &runtimeapi.ImageSpec{Image: image},
		Command:  []string{"/bin/sh", "-c"},
		Args:     []string{script},
		LogPath:  name + ".log",
		Linux:    &runtimeapi.LinuxContainerConfig{},
	}
}

// pod is a running pod with what is needed to make containers in it.
type pod struct {
	daemon
	id     string
	config *runtimeapi.PodSandboxConfig
	image  string
}

func (p pod) create(t *testing.T, config *runtimeapi.ContainerConfig) string {
	t.Helper()
	id, err := p.runtime.CreateContainer(context.Background(), p.id, config, p.config)
	if err != nil {
		t.Fatalf("CreateContainer(%s): %v", config.Metadata.Name, err)
	}
	return id
}

func (p pod) start(t *testing.T, config *runtimeapi.ContainerConfig) string {
	t.Helper()
	id := p.create(t, config)
	if err := p.runtime.StartContainer(context.Background(), id); err != nil {
		t.Fatalf("StartContainer(%s): %v", config.Metadata.Name, err)
	}
	return id
}

func (p pod) status(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	response, err := p.runtime.ContainerStatus(context.Background(), id, false)
	if err != nil {
		t.Fatalf("ContainerStatus: %v", err)
	}
	return response.Status
}

// exited waits for a container's end and returns its status then.
func (p pod) exited(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	var last *runtimeapi.ContainerStatus
	eventually(t, "the container's end", func() bool {
		last = p.status(t, id)
		return last.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	return last
}

func (p pod) logPath(name string) string { return filepath.Join(p.config.LogDirectory, name+".log") }

// eventually polls until a condition holds, with a limit far beyond any honest duration.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for %s", what)
		}
	}
}

// refused checks an error's code and that its text has what a person needs to know.
func refused(t *testing.T, err error, code codes.Code, texts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, %v was expected", code)
		return
	}
	if got := status.Code(err); got != code {
		t.Errorf("code %v, not %v: %v", got, code, err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not say %q", err, text)
		}
	}
}

func equal[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s is %v, not %v", what, got, want)
	}
}
