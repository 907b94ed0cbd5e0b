// Package interop drives vmrt with the client library that kubelet is compiled with (k8s.io/cri-client).
//
// TestDescriptors needs nothing. The others need a running daemon and two variables:
//
//	VMRT_SOCKET      path of the daemon's socket
//	VMRT_TEST_IMAGE  a reference to an image with a shell at /bin/sh and the usual small tools (busybox will do);
//	                 it is pulled when the daemon does not have it
//
// and, for the pull and removal of images, a third:
//
//	VMRT_TEST_PULL_IMAGE  a tagged reference, with registry, that can be pulled; it is removed at the end
//
// Without them the tests are skipped, unless CI=true and VMRT_INTEROP=1: then they fail.
package interop
